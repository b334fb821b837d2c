"""What is taken for what, and how well each class is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from treeify.evaluation.classes import confusion_matrix
from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table

# Drawn, of however many there are.
_PAIRS, _CLASSES, _MATRIX = 12, 25, 20


@style.in_style
def matrix(
    classes: Sequence[str],
    target: Tensor,
    answer: Tensor,
    *,
    name: str = "confusion",
    title: str = "Confusion",
) -> Chart:
    """What fraction of each class was answered with each class; for a few classes only.

    Args:
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        answer: what they were answered with, `[N]`.
        name: of the chart.
        title: of the chart.
    """
    counts = confusion_matrix(target, answer, len(classes))
    totals = counts.sum(1, keepdim=True).clamp(min=1)
    percent = (100 * counts / totals).tolist()
    figure, ax = style.axes(4.2)
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            if not value:
                continue
            shade = style.SERIES[0] if row == column else style.SERIES[1]
            ax.add_patch(_cell(column, row, shade, 0.12 + 0.78 * value / 100))
            if len(classes) <= 12:
                text = f"{value:.0f}" if value >= 1 else "<1"
                ink = style.PAPER if value > 55 else style.INK
                ax.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    names = [style.short(each, 14) for each in classes]
    turned = 90 if max(map(len, names)) > 3 else 0
    ax.set_xticks(range(len(classes)), names, rotation=turned)
    ax.set_yticks(range(len(classes)), names)
    ax.set_xlim(-0.5, len(classes) - 0.5)
    ax.set_ylim(len(classes) - 0.5, -0.5)
    ax.set_aspect("equal")
    ax.grid(visible=False)
    ax.set_xlabel("answer")
    ax.set_ylabel("class")
    rows = [
        (one, other, int(counts[row, column]), percent[row][column])
        for row, one in enumerate(classes)
        for column, other in enumerate(classes)
        if counts[row, column]
    ]
    headings: list[AnyColumn] = ["class", "answer", ("images", ",d"), ("% of the class", ".1f")]
    text = "Of every class (row), what percentage was answered with each class, by all leaves."
    return Chart(name, title, text, figure, Table.of(headings, rows))


def _cell(column: int, row: int, colour: str, alpha: float) -> Rectangle:
    return Rectangle(
        (column - 0.47, row - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0
    )


@style.in_style
def worst_pairs(
    classes: Sequence[str],
    target: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    name: str = "worst_pairs",
    title: str = "What is taken for what",
) -> Chart:
    """The pairs of classes that are confused most often, by one leaf and by all.

    Args:
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        first: what one leaf answers, `[N]`.
        last: what all leaves answer, `[N]`.
        name: of the chart.
        title: of the chart.
    """
    before, after = (
        confusion_matrix(target, answer, len(classes)).fill_diagonal_(0) for answer in (first, last)
    )
    ranked = _ranked(after, before)
    rows = [
        (classes[row], classes[column], int(after[row, column]), int(before[row, column]))
        for row, column in ranked
    ]
    drawn = rows[:_PAIRS]
    figure, ax = style.axes(1.1 + 0.3 * max(1, len(drawn)))
    places = range(len(drawn))
    ax.barh(
        places, [row[2] for row in drawn], height=0.6, color=style.SERIES[1], label="all leaves"
    )
    ax.plot(
        [row[3] for row in drawn],
        places,
        color=style.INK,
        marker="|",
        markersize=11,
        markeredgewidth=2,
        linestyle="none",
        label="one leaf",
    )
    names = [f"{style.short(row[0], 16)} → {style.short(row[1], 16)}" for row in drawn]
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("images")
    style.legend_below(figure)
    headings: list[AnyColumn] = ["class", "taken for", ("all leaves", ",d"), ("one leaf", ",d")]
    text = "Images of a class that were answered with another one, the most frequent pairs first."
    if len(rows) > len(drawn):
        text += f" Of {len(rows):,} pairs the first {len(drawn)} are drawn."
    if not rows:
        text = "All leaves together answer every image rightly: there are no pairs."
    return Chart(name, title, text, figure, Table.of(headings, rows[:100]))


def _ranked(after: Tensor, before: Tensor) -> list[tuple[int, int]]:
    """Pairs of classes that were confused, the worst first."""
    pairs = after.nonzero().tolist()
    return sorted(
        ((row, column) for row, column in pairs),
        key=lambda pair: (-int(after[pair]), -int(before[pair]), pair),
    )


@style.in_style
def class_accuracy(
    classes: Sequence[str],
    target: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    name: str = "class_accuracy",
    title: str = "Accuracy of each class",
) -> Chart:
    """Accuracy of every class, by one leaf and by all; the classes known worst are drawn.

    Args:
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        first: what one leaf answers, `[N]`.
        last: what all leaves answer, `[N]`.
        name: of the chart.
        title: of the chart.
    """
    count = len(classes)
    images = torch.bincount(target, minlength=count)
    before, after = (
        (100 * torch.bincount(target[answer == target], minlength=count) / images).tolist()
        for answer in (first, last)
    )
    present = [index for index in range(count) if images[index]]
    ranked = sorted(present, key=lambda index: (after[index], before[index]))
    drawn = ranked[:_CLASSES]
    figure, ax = style.axes(1.1 + 0.24 * len(drawn))
    places = range(len(drawn))
    one, all_leaves = ([values[index] for index in drawn] for values in (before, after))
    ax.hlines(places, one, all_leaves, color=style.MUTED, linewidth=1.4, zorder=2)
    dots: dict[str, Any] = {"linestyle": "none", "zorder": 3}
    ax.plot(one, places, "s", color=style.SERIES[1], markersize=4.5, label="one leaf", **dots)
    ax.plot(
        all_leaves, places, "o", color=style.SERIES[0], markersize=6, label="all leaves", **dots
    )
    ax.set_yticks(places, [style.short(classes[index], 22) for index in drawn])
    ax.invert_yaxis()
    ax.set_xlabel("accuracy, %")
    style.legend_below(figure)
    headings: list[AnyColumn] = [
        "class",
        ("images", ",d"),
        ("one leaf %", ".2f"),
        ("all leaves %", ".2f"),
    ]
    rows = [(classes[i], int(images[i]), before[i], after[i]) for i in ranked]
    text = "Of the images of each class, how many are answered rightly; the lowest first."
    if len(ranked) > len(drawn):
        text += f" Of {len(ranked):,} classes the lowest {len(drawn)} are drawn."
    if count > len(present):
        text += f" {count - len(present):,} classes have no held-out image."
    return Chart(name, title, text, figure, Table.of(headings, rows))


def has_matrix(classes: Sequence[str]) -> bool:
    """Whether there are few enough classes for a matrix that can be read."""
    return len(classes) <= _MATRIX
