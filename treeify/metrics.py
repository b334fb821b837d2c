"""How well every nested sub-ensemble answers: pure functions, and a running total over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from treeify.ensemble import HierarchicalEnsemble
from treeify.errors import DataError
from treeify.losses import nested_logits
from treeify.tree import Tree

# Images [N, 3, H, W], classes [N], and whatever else.
Batch = tuple[Any, ...]

# Of the calibration error, by confidence from 0 to 1; as many as Guo et al., ICML 2017, take.
_BINS = 15


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
    sizes = tree.nested_sizes
    return torch.stack([logits[:, :n].std(1, correction=0).mean(-1) for n in sizes], dim=1)


def _correct(nested: Tensor, target: Tensor) -> Tensor:
    return nested.argmax(-1) == target[:, None]


def _nll(nested: Tensor, target: Tensor) -> Tensor:
    shared = target[:, None].expand(nested.shape[:2])
    return F.cross_entropy(nested.transpose(1, 2), shared, reduction="none")


class Scores:
    """Running totals of every nested sub-ensemble's scores over batches.

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
        self.totals = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
        }

    @property
    def images(self) -> int:
        """How many were counted."""
        return int(self.totals["images"])

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch of leaf logits [N, L, K] with classes [N]."""
        logits = logits.detach().float()
        nested = nested_logits(logits, self.tree)
        confidence = nested.softmax(-1).amax(-1)
        right = _correct(nested, target).float()
        bins = F.one_hot((confidence * _BINS).long().clamp(max=_BINS - 1), _BINS).float()
        found = {
            "images": torch.full((), len(target), device=logits.device),
            "correct": right.sum(0),
            "nll": _nll(nested, target).sum(0),
            "std": logit_std(logits, self.tree).sum(0),
            "leaf_correct": (logits.argmax(-1) == target[:, None]).sum(0),
            "bin_images": bins.sum(0),
            "bin_confidence": (bins * confidence[..., None]).sum(0),
            "bin_correct": (bins * right[..., None]).sum(0),
        }
        # In one piece, for which a GPU is waited for once; not every device has doubles.
        values = torch.cat([found[name].flatten().float() for name in self.totals]).cpu().double()
        sizes = [total.numel() for total in self.totals.values()]
        for total, own in zip(self.totals.values(), torch.split(values, sizes), strict=True):
            total += own.view(total.shape)

    @property
    def accuracy(self) -> float:
        """Of all leaves so far, in percent; not a number before the first image."""
        return float(100 * self.totals["correct"][-1] / self.totals["images"])

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
