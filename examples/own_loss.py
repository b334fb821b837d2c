"""A loss of one's own, in a loop of one's own and in a recipe.

Its keyword-only parameters are options of recipes: where this file is in the current directory,

treeify train digits_hne loss.name=own_loss:first_leaves loss.emphasis=2

trains with it.

python examples/own_loss.py
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import treeify
from treeify import losses
from treeify.data import digits
from treeify.models import cifar_resnet50


def first_leaves(
    logits: Tensor, target: Tensor, tree: treeify.Tree, *, emphasis: float = 2.0
) -> Tensor:
    """Cross-entropy of every nested size, where the first matters `emphasis` times the last.

    Args:
        logits: of all leaves, `[N, L, K]`.
        target: classes, `[N]` integers.
        tree: says which leaves the nested sizes have.
        emphasis: weight of the first size; weights fall evenly to 1.
    """
    nested = losses.nested_logits(logits, tree)  # [N, sizes, K]: what users of the ensemble get
    weights = torch.linspace(emphasis, 1, nested.shape[1], device=logits.device)
    errors = [F.cross_entropy(answer, target) for answer in nested.unbind(1)]
    return (weights * torch.stack(errors)).sum()


def main() -> None:
    """Train for three epochs and measure the first and the last size."""
    torch.manual_seed(0)
    data = digits(held_out=1200)
    hne = treeify.hierarchicalize(
        cifar_resnet50(width=0.25, layers=[1, 1, 1, 1]),
        ["block3", "block4"],
        init="fresh",
        example_input=data.example()[None],
    )
    optimizer = torch.optim.SGD(hne.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for x, y in DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            first_leaves(hne(x), y, hne.tree).backward()
            optimizer.step()
    ((images, labels),) = DataLoader(data.held_out, batch_size=len(data.held_out))
    for leaves in (1, hne.leaves):
        accuracy = (hne.eval().predict(images, leaves=leaves).argmax(1) == labels).double().mean()
        print(f"{leaves} leaves: {accuracy:.1%}")


if __name__ == "__main__":
    main()
