"""Fine-tune a model of timm's in a plain PyTorch loop, with a loss on the logits of all leaves.

`hne(x)` gives one set of logits per leaf, [N, L, K]: `F.cross_entropy(hne(x), y)` would take the
leaves for classes. The losses of `treeify.losses` know the tree. `treeify train` does all this from
a recipe; here is what it takes without.

python examples/plain_loop.py
"""

import tempfile

import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torch.utils.data import DataLoader

import treeify
from treeify import losses
from treeify.data import digits


def main() -> None:
    """Train for four epochs on digits, measure every nested size, save and load."""
    torch.manual_seed(0)
    data = digits(held_out=1200)
    # pretrained=True in your case: every branch begins with the weights, all but the first with
    # noise on them (init="perturb").
    base = timm.create_model("test_resnet", pretrained=False, num_classes=len(data.classes))
    hne = treeify.hierarchicalize(
        base, splits=["layer3", "layer4"], init="perturb", example_input=torch.zeros(1, 3, 32, 32)
    )
    optimizer = create_optimizer_v2(hne, opt="adamw", lr=2e-3, weight_decay=0.05)
    for epoch in range(4):
        hne.train()
        for images, labels in DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True):
            logits = hne(F.interpolate(images, 32))
            loss = losses.hierarchical_distillation(logits, labels, hne.tree)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}")
    hne.eval()
    images, labels = next(iter(DataLoader(data.held_out, batch_size=len(data.held_out))))
    images = F.interpolate(images, 32)
    with torch.no_grad():
        nested = losses.nested_logits(hne(images), hne.tree)
    for leaves, logits in zip(hne.tree.nested_sizes, nested.unbind(1), strict=True):
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        print(f"{leaves} leaves: {accuracy:.1%}")
    with tempfile.TemporaryDirectory() as directory:
        treeify.save(hne, directory)
        again = treeify.load(directory)
    print(f"loaded again: {torch.equal(again(images[:8]), hne(images[:8]))}")


if __name__ == "__main__":
    main()
