"""Reliability diagrams: whether answers are as often right as they are sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treeify.report import style
from treeify.report.chart import Chart, Table

# As many as the calibration error of `treeify.evaluation.metrics` has.
_BINS = 15


@style.in_style
def reliability(
    sizes: Sequence[int],
    confidence: Tensor,
    correct: Tensor,
    errors: Sequence[float],
    *,
    name: str = "reliability",
    title: str = "Is it as right as it is sure?",
) -> Chart:
    """Accuracy over confidence of some nested sizes, in equal bins of confidence.

    Args:
        sizes: `S` numbers of leaves.
        confidence: the probability of the likeliest class, `[S, N]`.
        correct: whether that class is right, `[S, N]`.
        errors: the calibration error of each size in percent.
        name: of the chart.
        title: of the chart.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    figure, ax = style.axes(3.6)
    look: dict[str, Any] = {"color": style.MUTED, "linestyle": (0, (4, 3)), "linewidth": 1}
    ax.plot([0, 100], [0, 100], label="as right as sure", **look)
    rows = []
    for index, (size, error) in enumerate(zip(sizes, errors, strict=True)):
        bins = _bins(confidence[index], correct[index])
        leaves = style.leaves(size)
        curve = {**style.line(index), "linewidth": 1.2}
        label = f"{leaves}, calibration error {error:.1f} %"
        ax.plot([row[1] for row in bins], [row[2] for row in bins], label=label, zorder=3, **curve)
        most = max(row[0] for row in bins)
        areas = [20 + 160 * row[0] / most for row in bins]
        points = [row[1] for row in bins], [row[2] for row in bins]
        ax.scatter(*points, areas, color=style.colour(index), alpha=0.3, linewidth=0, zorder=2)
        rows += [(size, *row) for row in bins]
    ax.set_xlim(0, 102)
    ax.set_ylim(-3, 104)
    ax.set_xlabel("confidence: probability of the likeliest class, %")
    ax.set_ylabel("accuracy, %")
    style.legend_below(figure, columns=1)
    headings = [("leaves", "d"), ("images", ",d"), ("confidence %", ".1f"), ("accuracy %", ".1f")]
    text = (
        f"Images in {_BINS} equal bins of confidence; discs are the larger, the more images a bin"
        " has. Below the dashed line answers are surer than they are right, above it they are right"
        " more often than they say. Calibration error: the mean distance from it."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))


def _bins(confidence: Tensor, correct: Tensor) -> list[tuple[int, float, float]]:
    """Images, mean confidence and accuracy in percent of every bin that is not empty."""
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    images = torch.bincount(bins, minlength=_BINS)
    sure = torch.bincount(bins, confidence.double(), _BINS)
    right = torch.bincount(bins, correct.double(), _BINS)
    return [
        (count, 100 * sure[index].item() / count, 100 * right[index].item() / count)
        for index, count in enumerate(images.tolist())
        if count
    ]
