"""How well every nested sub-ensemble answers: pure functions, and a running total over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.errors import DataError
from treeify.losses import nested_logits
from treeify.tree import Tree

# Images [N, 3, H, W], classes [N], and whatever else.
Batch = tuple[Any, ...]

# Of the calibration error, by confidence from 0 to 1; as many as Guo et al., ICML 2017, take.
_BINS = 15

# Logits of batches that are counted together: with fewer, calling takes longer than computing.
_TOGETHER = 2**17


@dataclass(frozen=True)
class Score:
    """What one nested sub-ensemble reached.

    Args:
        leaves: its size `n`.
        accuracy: images whose class has the largest mean logit, in percent.
        nll: negative log-likelihood of the mean logits, nats per image.
        calibration_error: how far confidence and accuracy are apart, in percent, in the mean over
            15 equal bins of confidence weighted by their images (Guo et al., ICML 2017).
        logit_std: standard deviation of the logits over its leaves (divided by `n`, not `n - 1`),
            averaged over classes and images; 0 for one leaf.
    """

    leaves: int
    accuracy: float
    nll: float
    calibration_error: float
    logit_std: float


def correct(logits: Tensor, target: Tensor, tree: Tree) -> Tensor:
    """Which images each nested sub-ensemble gets right.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N].
        tree: the shape the leaves belong to.

    Returns:
        Booleans [N, B + 1], from one leaf to all `L`.
    """
    return _correct(nested_logits(logits, tree), target)


def nll(logits: Tensor, target: Tensor, tree: Tree) -> Tensor:
    """Negative log-likelihood of the mean logits of each nested sub-ensemble.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N].
        tree: the shape the leaves belong to.

    Returns:
        Nats per image and size, [N, B + 1].
    """
    return _nll(nested_logits(logits, tree), target)


def logit_std(logits: Tensor, tree: Tree) -> Tensor:
    """How much the leaves of each nested sub-ensemble disagree.

    Args:
        logits: of every leaf, [N, L, K].
        tree: the shape the leaves belong to.

    Returns:
        Standard deviation over the leaves, averaged over classes: [N, B + 1].

    Source: Ruiz & Verbeek, AAAI 2021, section 4 (figures 3 and 9).
    """
    return _logit_std(logits, nested_logits(logits, tree), tree)


def _correct(nested: Tensor, target: Tensor) -> Tensor:
    return nested.argmax(-1) == target[:, None]


def _logit_std(logits: Tensor, nested: Tensor, tree: Tree) -> Tensor:
    # Not `Tensor.std`: over few leaves it takes up to ten times as long.
    apart = [
        (logits[:, :size] - nested[:, index, None]).square().mean(1).sqrt().mean(-1)
        for index, size in enumerate(tree.nested_sizes)
    ]
    return torch.stack(apart, dim=1)


def _nll(nested: Tensor, target: Tensor) -> Tensor:
    shared = target[:, None].expand(nested.shape[:2])
    return F.cross_entropy(nested.transpose(1, 2), shared, reduction="none")


class Scores:
    """Running totals of every nested sub-ensemble's scores over batches.

    Small batches are counted several at a time, with the same outcome to the last bit.

    Args:
        tree: the shape the leaves belong to.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        sizes = tree.levels
        shapes = {
            "images": (),
            "correct": (sizes,),
            "nll": (sizes,),
            "std": (sizes,),
            "leaf_correct": (tree.leaves,),
            "bin_images": (sizes, _BINS),
            "bin_confidence": (sizes, _BINS),
            "bin_correct": (sizes, _BINS),
        }
        numbers = [prod(shape) for shape in shapes.values()]
        self._sums = torch.zeros(sum(numbers), dtype=torch.float64)
        self._totals = {
            name: own.view(shape)
            for (name, shape), own in zip(
                shapes.items(), torch.split(self._sums, numbers), strict=True
            )
        }
        self._uncounted: list[tuple[Tensor, Tensor]] = []

    @property
    def totals(self) -> dict[str, Tensor]:
        """Sums over all images, by name."""
        self._count()
        return self._totals

    @property
    def images(self) -> int:
        """How many were added."""
        return int(self._totals["images"]) + sum(len(target) for _, target in self._uncounted)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch of leaf logits [N, L, K] with classes [N]."""
        self._uncounted.append((logits.detach().float(), target))
        if sum(own.numel() for own, _ in self._uncounted) >= _TOGETHER:
            self._count()

    def _count(self) -> None:
        """Bring the totals up to date."""
        if not self._uncounted:
            return
        batches = [len(target) for _, target in self._uncounted]
        logits, target = map(torch.cat, zip(*self._uncounted, strict=True))
        self._uncounted = []
        nested = nested_logits(logits, self.tree)
        confidence = nested.softmax(-1).amax(-1)
        right = _correct(nested, target).float()
        every = torch.ones_like(right)
        bins = F.one_hot((confidence * _BINS).long().clamp(max=_BINS - 1), _BINS)
        binned = torch.stack([every, confidence, right], dim=1)[..., None] * bins[:, None]
        # Of each image, in the order of the totals.
        found = (
            every[:, :1],
            *(right, _nll(nested, target), _logit_std(logits, nested, self.tree)),
            (logits.argmax(-1) == target[:, None]).float(),
            binned.flatten(1),
        )
        # A GPU is waited for once; not every device has doubles.
        sums = torch.stack([own.sum(0) for own in torch.split(torch.cat(found, dim=1), batches)])
        for own in sums.cpu().double():
            self._sums += own

    @property
    def accuracy(self) -> float:
        """Of all leaves so far, in percent, up to the last images counted; not a number before."""
        return float(100 * self._totals["correct"][-1] / self._totals["images"])

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from totals noted before."""
        for name, total in self.totals.items():
            total.copy_(totals[name])

    def result(self) -> tuple[Score, ...]:
        """The scores so far, from one leaf to all `L`.

        Raises:
            DataError: no image was counted.
        """
        if not self.images:
            raise DataError("there are no images to measure accuracy on.")
        totals = self.totals
        gaps = (totals["bin_confidence"] - totals["bin_correct"]).abs().sum(-1)
        return tuple(
            Score(leaves, *row)
            for leaves, row in zip(
                self.tree.nested_sizes,
                torch.stack(
                    [
                        100 * totals["correct"] / self.images,
                        totals["nll"] / self.images,
                        100 * gaps / self.images,
                        totals["std"] / self.images,
                    ],
                    dim=1,
                ).tolist(),
                strict=True,
            )
        )

    def leaf_accuracy(self) -> tuple[float, ...]:
        """Of every single leaf by itself, in percent."""
        return tuple((100 * self.totals["leaf_correct"] / self.images).tolist())


@torch.no_grad()
def measure(
    hne: HierarchicalEnsemble,
    batches: Iterable[Batch],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Count every nested sub-ensemble's scores in evaluation mode, in one pass over the images.

    Args:
        hne: the ensemble; keeps the mode it was in.
        batches: images [N, 3, H, W] and classes [N].
        stop: asked before every batch but the first; when it says so, the rest is left out.

    Returns:
        The totals.
    """
    was_training = hne.training
    hne.eval()
    first = next(hne.parameters())
    scores = Scores(hne.tree)
    for images, target, *_ in batches:
        if scores.images and stop():
            break
        if len(images):
            scores.add(hne(images.to(first.device, first.dtype)), target.to(first.device))
    hne.train(was_training)
    return scores


def evaluate(hne: HierarchicalEnsemble, batches: Iterable[Batch]) -> tuple[Score, ...]:
    """Score every nested sub-ensemble in evaluation mode, in one pass over the images.

    Args:
        hne: the ensemble; keeps the mode it was in.
        batches: images [N, 3, H, W] and classes [N].

    Returns:
        One score per nested size, from one leaf to all `L`.

    Raises:
        DataError: there are no images.
    """
    return measure(hne, batches).result()
