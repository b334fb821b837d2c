"""How well every nested sub-ensemble answers: pure functions, and a running total over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from treeify.ensemble import HierarchicalEnsemble
from treeify.errors import DataError
from treeify.losses import nested_logits
from treeify.tree import Tree


@dataclass(frozen=True)
class Score:
    """What one nested sub-ensemble reached.

    Args:
        leaves: its size `n`.
        accuracy: images whose class has the largest mean logit, in percent.
        nll: negative log-likelihood of the mean logits, nats per image.
    """

    leaves: int
    accuracy: float
    nll: float


def correct(logits: Tensor, target: Tensor, tree: Tree) -> Tensor:
    """Which images each nested sub-ensemble gets right.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N].
        tree: the shape the leaves belong to.

    Returns:
        Booleans [N, B + 1], from one leaf to all `L`.
    """
    return nested_logits(logits, tree).argmax(-1) == target[:, None]


def nll(logits: Tensor, target: Tensor, tree: Tree) -> Tensor:
    """Negative log-likelihood of the mean logits of each nested sub-ensemble.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N].
        tree: the shape the leaves belong to.

    Returns:
        Nats per image and size, [N, B + 1].
    """
    nested = nested_logits(logits, tree)
    shared = target[:, None].expand(nested.shape[:2])
    return F.cross_entropy(nested.transpose(1, 2), shared, reduction="none")


class Scores:
    """Running totals of every nested sub-ensemble's scores over batches.

    Args:
        tree: the shape the leaves belong to.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.images = 0
        self._correct = torch.zeros(tree.levels, dtype=torch.int64)
        self._nll = torch.zeros(tree.levels, dtype=torch.float64)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch of leaf logits [N, L, K] with classes [N]."""
        logits = logits.detach().float()
        self.images += len(target)
        self._correct += correct(logits, target, self.tree).sum(0).cpu()
        self._nll += nll(logits, target, self.tree).double().sum(0).cpu()

    def result(self) -> tuple[Score, ...]:
        """The scores so far, from one leaf to all `L`.

        Raises:
            DataError: no image was counted.
        """
        if not self.images:
            raise DataError("there are no images to measure accuracy on.")
        return tuple(
            Score(leaves, 100 * right / self.images, loss / self.images)
            for leaves, right, loss in zip(
                self.tree.nested_sizes, self._correct.tolist(), self._nll.tolist(), strict=True
            )
        )


@torch.no_grad()
def evaluate(
    hne: HierarchicalEnsemble,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Score, ...]:
    """Score every nested sub-ensemble in evaluation mode, in one pass over the images.

    Args:
        hne: the ensemble; keeps the mode it was in.
        batches: images [N, 3, H, W] and classes [N].
        stop: asked before every batch but the first; when it says so, the rest is left out.

    Returns:
        One score per nested size, from one leaf to all `L`.

    Raises:
        DataError: there are no images.
    """
    was_training = hne.training
    hne.eval()
    device = next(hne.parameters()).device
    scores = Scores(hne.tree)
    for images, target in batches:
        if scores.images and stop():
            break
        scores.add(hne(images.to(device)), target.to(device))
    hne.train(was_training)
    return scores.result()
