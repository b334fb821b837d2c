"""Spend a number of MACs per image on average: easy images stop after few leaves.

Thresholds of confidence are chosen on one half of the held-out images and used on the other.

python examples/budgeted_batch.py
"""

import torch
from torch.utils.data import DataLoader

import treeify
from treeify import losses
from treeify.anytime.confidence import budget
from treeify.data import digits
from treeify.models import cifar_resnet50


def main() -> None:
    """Train for some epochs, choose thresholds for two budgets, and say what they give."""
    torch.manual_seed(0)
    data = digits(held_out=1000)
    hne = treeify.hierarchicalize(
        cifar_resnet50(width=0.25, layers=[1, 1, 1, 1]),
        ["block2", "block3", "block4"],
        init="fresh",
        example_input=data.example()[None],
    )
    optimizer = torch.optim.SGD(hne.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for x, y in DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            losses.hierarchical_distillation(hne(x), y, hne.tree).backward()
            optimizer.step()
    hne.eval()
    (chosen_on, labels), (images, truth) = DataLoader(data.held_out, batch_size=500)
    with torch.no_grad():
        logits = losses.nested_logits(hne(chosen_on), hne.tree).transpose(0, 1)  # [sizes, N, K]
    sizes = hne.tree.nested_sizes
    macs = [hne.count_macs(size) for size in sizes]
    for size in sizes:
        accuracy = (hne.predict(images, leaves=size).argmax(1) == truth).double().mean()
        print(f"{size} leaves, every image: {hne.count_macs(size):7,} MACs, {accuracy:.1%}")
    for target in (macs[1], macs[2]):
        thresholds = budget(logits, labels, sizes, macs, target)
        answer = hne.predict(images, confidence=thresholds)
        spent = sum(hne.count_macs(int(leaves)) for leaves in answer.leaves) / len(images)
        accuracy = (answer.logits.argmax(1) == truth).double().mean()
        print(f"budget {target:,}: {spent:,.0f} MACs on average, {accuracy:.1%}")


if __name__ == "__main__":
    main()
