"""Whether leaves are worth their cost: beside one leaf, one another and the base model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from treeify.arguments import require_callable, require_type
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.conversion.trained import load_trained
from treeify.engine.packed_tensors import named_tensors
from treeify.evaluation.metrics import Batch, Score, Scores, measure, require_answers, require_some
from treeify.losses import nested_logits
from treeify.tree import Tree

# A gain of fewer standard errors may be chance; leaves that differ on a smaller fraction of what
# one leaf errs on have little to correct in one another.
_ERRORS, _FRACTION = 2.0, 0.25


@dataclass(frozen=True)
class Gain:
    """What a nested size has over one leaf, in percent of the images.

    Args:
        leaves: its size.
        gain: its accuracy less that of one leaf.
        error: standard error of that, from the images that only one of both answers rightly.
        disagreement: on how many images two of its leaves name different classes, averaged over all
            pairs; 0 for one leaf.
    """

    leaves: int
    gain: float
    error: float
    disagreement: float


class Gains:
    """Running totals, over batches, of how the nested sizes and the leaves differ.

    Args:
        tree: the shape the leaves belong to.
    """

    def __init__(self, tree: Tree) -> None:
        require_type("tree", tree, Tree, "a tree, such as hne.tree")
        self.tree = tree
        self.images = 0
        self._gained = torch.zeros(tree.levels, dtype=torch.double)
        self._changed = torch.zeros(tree.levels, dtype=torch.double)
        self._differ = torch.zeros(tree.leaves, tree.leaves, dtype=torch.double)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Observe a batch of leaf logits [N, L, K] with classes [N].

        Raises:
            InputError: they do not fit each other or the tree.
        """
        require_answers(logits, target, self.tree)
        nested = nested_logits(logits.float(), self.tree)
        correct = (nested.argmax(-1) == target[:, None]).int()
        change = correct - correct[:, :1]
        classes = logits.argmax(-1)
        differ = classes[:, :, None] != classes[:, None]
        self.images += len(target)
        self._gained += change.sum(0).cpu()
        self._changed += change.abs().sum(0).cpu()
        self._differ += differ.sum(0).cpu()

    def result(self) -> tuple[Gain, ...]:
        """The gains so far, from one leaf to all `L`.

        Raises:
            DataError: no image was counted.
        """
        require_some(self.images)
        mean, square = self._gained / self.images, self._changed / self.images
        errors = ((square - mean.square()).clamp(min=0) / self.images).sqrt()
        sizes = self.tree.nested_sizes
        differ = [
            (self._differ[:size, :size].sum() / max(1, size * (size - 1)) / self.images).item()
            for size in sizes
        ]
        rows = zip(sizes, mean.tolist(), errors.tolist(), differ, strict=True)
        return tuple(Gain(size, *(100 * value for value in values)) for size, *values in rows)


def compare(
    hne: HierarchicalEnsemble,
    batches: Iterable[Batch],
    base: nn.Module | None = None,
    *,
    observe: Callable[[Tensor, Tensor, Tensor], None] = lambda images, logits, target: None,
) -> tuple[Scores, Gains, Score | None]:
    """Scores, gains over one leaf, and the base model's score, in one pass over the images.

    Args:
        hne: the ensemble; every module's mode is put back.
        batches: images [N, 3, H, W] and classes [N].
        base: the base model in evaluation mode, if it is to be measured too.
        observe: called with every batch: images, leaf logits [N, L, K] and classes [N].

    Raises:
        DataError: as of `treeify.evaluation.metrics.measure`.
        InputError: as there, or the base model is no module.
    """
    require_ensemble(hne)
    require_callable("observe", observe, "images, leaf logits and classes")
    if base is not None:
        require_type("base", base, nn.Module, "the base model, an nn.Module")
    gains, base_scores = Gains(hne.tree), Scores(Tree())

    def count(x: Tensor, logits: Tensor, target: Tensor) -> None:
        gains.add(logits, target)
        observe(x, logits, target)
        if base is not None:
            base_scores.add(base(x)[:, None], target)

    scores = measure(hne, batches, observe=count)
    return scores, gains, None if base is None else base_scores.result()[0]


def verdict(gain: Gain, cost: float, wrong: float, images: int) -> str | None:
    """A sentence where leaves agree too much to be worth their cost; None where they do not.

    That is, they are worse than one, their gain is less than twice its standard error, or two of
    them differ on less than a quarter as many images as one leaf errs on.

    Args:
        gain: of the size in question.
        cost: its MACs over those of one leaf.
        wrong: images that one leaf answers wrongly, in percent.
        images: how many were answered.
    """
    if gain.leaves == 1:
        return None
    agree = gain.disagreement < _FRACTION * wrong
    if gain.gain < -_ERRORS * gain.error:
        reason = f", which {images:,} images tell from chance (standard error {gain.error:.2f})"
    elif gain.gain <= _ERRORS * gain.error:
        reason = f", within the noise of {images:,} images (standard error {gain.error:.2f})"
    elif agree:
        reason = ", as they agree"
    else:
        return None
    return (
        f"{gain.leaves} leaves cost {cost:.2f} times the MACs of one for {gain.gain:+.2f} points of"
        f" accuracy{reason}: two leaves name different classes for {gain.disagreement:.1f} % of the"
        f" images, and one errs on {wrong:.1f} %."
        + (" They differ more with earlier splits and fresh branches." if agree else "")
    )


def base_model_of(
    hne: HierarchicalEnsemble, weights: Path | None, *, trust: bool = False
) -> nn.Module:
    """The untouched base model, in evaluation mode and on the ensemble's device.

    Args:
        hne: the ensemble.
        weights: its trained weights, see `treeify.conversion.trained.load_trained`; without them it
            has those of leaf 0.
        trust: as in `treeify.load`, for a directory of weights.

    Raises:
        CheckpointError: the weights cannot be read, or are of another model.
        InputError: `hne` is no ensemble.
    """
    require_ensemble(hne)
    base = hne.leaf(0)
    return (base if weights is None else load_trained(base, weights, trust=trust).model).eval()


def is_leaf(base: nn.Module, hne: HierarchicalEnsemble, index: int = 0) -> bool:
    """Whether a base model has the very weights of a leaf."""
    require_ensemble(hne)
    require_type("base", base, nn.Module, "the base model, an nn.Module")
    leaf = dict(named_tensors(hne.leaf(index)))
    tensors = dict(named_tensors(base))
    return tensors.keys() == leaf.keys() and all(
        torch.equal(tensor, leaf[key]) for key, tensor in tensors.items()
    )
