"""A curve of training in one line of a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from treeify.training.events import Epoch

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-~=+*#"  # darker and higher, for terminals whose encoding has no blocks
# Two curves, their names and numbers fit 80 columns.
_WIDTH = 20


def spark(values: Sequence[float], encoding: str, width: int = _WIDTH) -> str:
    """A character for each value, from the lowest for the least to the highest for the largest.

    Args:
        values: what is no finite number is left out; equal ones are the lowest.
        encoding: of the terminal; where it has no block characters, ASCII stands for them.
        width: most characters. Of more values, neighbours are averaged.
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(len(values), width)
    bounds = [len(values) * part // count for part in range(count + 1)] if count else []
    means = [fmean(values[start:stop]) for start, stop in pairwise(bounds)]
    least, most = min(means, default=0.0), max(means, default=0.0)
    marks = _BLOCKS if _can_show(_BLOCKS, encoding) else _ASCII
    scale = (len(marks) - 1) / (most - least) if most > least else 0.0
    return "".join(marks[round((mean - least) * scale)] for mean in means)


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def live_line(epochs: Sequence[Epoch], encoding: str) -> str:
    """Loss and accuracy of the epochs so far; empty before there are two."""
    if len(epochs) < 2:
        return ""
    losses, accuracies = _losses(epochs), _accuracies(epochs)
    return (
        f"loss {spark(losses, encoding)} {losses[-1]:.2f}"
        f"  held out {spark(accuracies, encoding)} {accuracies[-1]:.1f} %"
    )


def summary(epochs: Sequence[Epoch], encoding: str) -> list[str]:
    """The same, a line each, with where they began; none where there was one epoch."""
    if len(epochs) < 2:
        return []
    losses, accuracies = _losses(epochs), _accuracies(epochs)
    leaves = epochs[-1].held_out[-1].leaves
    return [
        f"Loss by epoch:              {spark(losses, encoding)}"
        f"  {losses[0]:.3f} to {losses[-1]:.3f}",
        f"Held-out accuracy by epoch: {spark(accuracies, encoding)}"
        f"  {accuracies[0]:.2f} to {accuracies[-1]:.2f} %, {leaves} leaves",
    ]


def _losses(epochs: Sequence[Epoch]) -> list[float]:
    return [epoch.loss for epoch in epochs]


def _accuracies(epochs: Sequence[Epoch]) -> list[float]:
    return [epoch.held_out[-1].accuracy for epoch in epochs]
