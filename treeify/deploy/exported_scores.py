"""How well an export answers, and how fast, as `treeify.evaluation` measures ensembles."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from treeify.deploy.exported import ExportedEnsemble
from treeify.engine import timing
from treeify.errors import DataError, quoted
from treeify.evaluation.comparison import Gains
from treeify.evaluation.metrics import Batch, Scores, pairs, require_labels


def exported_scores(
    exported: ExportedEnsemble,
    batches: Iterable[Batch],
    classes: Sequence[str],
    *,
    observe: Callable[[Tensor, Tensor, Tensor], None] = lambda images, logits, target: None,
) -> tuple[Scores, Gains]:
    """The scores of every nested size, and the gains over one leaf, in one pass over the images.

    Args:
        exported: answers by its runtime.
        batches: images `[N, C, H, W]` and classes `[N]`.
        classes: names of the data's.
        observe: called with every batch: images, leaf logits `[N, L, K]` and classes `[N]`.

    Raises:
        DataError: there is not one logit for each class, or a class is out of range.
        InputError: the images do not fit.
    """
    scores, gains = Scores(exported.tree), Gains(exported.tree)
    for images, target in pairs(batches):
        if not len(images):  # none of them can be read
            continue
        logits = exported.leaf_logits(images)
        if logits.shape[-1] != len(classes):
            raise DataError(
                "the data do not fit the export.",
                expected=f"data of {logits.shape[-1]} classes",
                found=f"{len(classes)}: {quoted(classes)}",
            )
        require_labels(target, len(classes))
        scores.add(logits, target)
        gains.add(logits, target)
        observe(images, logits, target)
    return scores, gains


def exported_seconds(
    exported: ExportedEnsemble, x: Tensor, *, budget: float = 3.0
) -> dict[int, float]:
    """The median seconds of an answer on this machine, by number of leaves.

    Args:
        exported: answers by its runtime.
        x: images `[N, C, H, W]` to answer at once.
        budget: seconds after which no more rounds begin.
    """
    actions = {str(size): partial(exported.predict, x, leaves=size) for size in exported.sizes}
    times = timing.alternate(actions, torch.device("cpu"), repeats=51, budget=budget)
    return {int(size): seconds for size, seconds in timing.medians(times).items()}
