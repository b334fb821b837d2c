"""Train an ensemble in a loop of your own, with a loss of the paper's on the logits of all leaves.

`hne(x)` gives one set of logits per leaf, [N, L, K]: `F.cross_entropy(hne(x), y)` would take the
leaves for classes. The losses of `treeify.losses` know the tree. `treeify train` does all this from
a recipe; here is what it takes without.

python examples/plain_loop.py
"""

import tempfile

import torch
from torch.utils.data import DataLoader

import treeify
from treeify import losses
from treeify.data import digits
from treeify.models import cifar_resnet50


def main() -> None:
    """Train for two epochs on small digits, measure every nested size, save and load."""
    torch.manual_seed(0)
    data = digits(held_out=1200)
    base = cifar_resnet50(num_classes=len(data.classes), width=0.25, layers=[1, 1, 1, 1])
    hne = treeify.hierarchicalize(
        base, splits=["block3", "block4"], init="perturb", example_input=data.example()[None]
    )
    optimizer = torch.optim.SGD(hne.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        hne.train()
        for images, labels in DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True):
            loss = losses.hierarchical_distillation(hne(images), labels, hne.tree)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}")
    hne.eval()
    images, labels = next(iter(DataLoader(data.held_out, batch_size=len(data.held_out))))
    with torch.no_grad():
        nested = losses.nested_logits(hne(images), hne.tree)
    for leaves, logits in zip(hne.tree.nested_sizes, nested.unbind(1), strict=True):
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        print(f"{leaves} leaves: {accuracy:.1%}")
    with tempfile.TemporaryDirectory() as directory:
        treeify.save(hne, directory)
        again = treeify.load(directory, model=base)
    print(f"loaded again: {torch.equal(again(images[:8]), hne(images[:8]))}")


if __name__ == "__main__":
    main()
