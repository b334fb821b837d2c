"""What is taken for what, and how well each class is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from treeify.evaluation.classes import confused_pairs, confusion_matrix, per_class
from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table

# Drawn, of however many there are.
_PAIRS, _CLASSES, _MATRIX = 12, 25, 20


@style.in_style
def matrix(
    classes: Sequence[str],
    target: Tensor,
    answer: Tensor,
    leaves: int,
    *,
    name: str = "confusion",
    title: str = "Confusion",
) -> Chart:
    """What fraction of each class was answered with each class; for a few classes only.

    Args:
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        answer: what they were answered with, `[N]`.
        leaves: how many answered.
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
    text = (
        "Of every class (row), what percentage was answered with each class, by"
        f" {style.leaves(leaves)}."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))


def _cell(column: int, row: int, colour: str, alpha: float) -> Rectangle:
    return Rectangle(
        (column - 0.47, row - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0
    )


@style.in_style
def worst_pairs(
    classes: Sequence[str],
    target: Tensor,
    answers: Mapping[int, Tensor],
    *,
    name: str = "worst_pairs",
    title: str = "What is taken for what",
) -> Chart:
    """The pairs of classes that are confused most often, by the fewest leaves and by the most.

    Args:
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        answers: what the smallest and the largest size answer, `[N]`, by numbers of leaves; one
            entry where they are the same.
        name: of the chart.
        title: of the chart.
    """
    labels = [style.leaves(size) for size in sorted(answers, reverse=True)]
    # Of the most leaves first, which rank.
    counts = [
        confused_pairs(target, answers[size], len(classes))
        for size in sorted(answers, reverse=True)
    ]
    ranked = sorted(counts[0], key=lambda pair: (*(-each.get(pair, 0) for each in counts), pair))
    rows: list[tuple[Any, ...]] = [
        (classes[row], classes[column], *(each.get((row, column), 0) for each in counts))
        for row, column in ranked
    ]
    drawn = rows[:_PAIRS]
    figure, ax = style.axes(1.1 + 0.3 * max(1, len(drawn)))
    places = range(len(drawn))
    ax.barh(places, [row[2] for row in drawn], height=0.6, color=style.SERIES[1], label=labels[0])
    if len(labels) > 1:
        ax.plot(
            [row[3] for row in drawn],
            places,
            color=style.INK,
            marker="|",
            markersize=11,
            markeredgewidth=2,
            linestyle="none",
            label=labels[1],
        )
    names = [f"{style.short(row[0], 16)} → {style.short(row[1], 16)}" for row in drawn]
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("images")
    style.legend_below(figure)
    headings: list[AnyColumn] = ["class", "taken for", *((label, ",d") for label in labels)]
    text = "Images of a class that were answered with another one, the most frequent pairs first."
    if len(rows) > len(drawn):
        text += f" Of {len(rows):,} pairs the first {len(drawn)} are drawn."
    if not rows:
        text = f"Every image is answered rightly by {labels[0]}: there are no pairs."
    return Chart(name, title, text, figure, Table.of(headings, rows[:100]))


@style.in_style
def class_accuracy(
    classes: Sequence[str],
    target: Tensor,
    answers: Mapping[int, Tensor],
    *,
    name: str = "class_accuracy",
    title: str = "Accuracy of each class",
) -> Chart:
    """Accuracy of every class, by the fewest leaves and by the most; the lowest are drawn.

    Args:
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        answers: what the smallest and the largest size answer, `[N]`, by numbers of leaves; one
            entry where they are the same.
        name: of the chart.
        title: of the chart.
    """
    count, sizes = len(classes), sorted(answers)
    named = torch.stack([answers[size] for size in sizes], 1)
    rows = [
        (classes[score.index], score.images, *score.accuracy)
        for score in per_class(target, named, count)
        if score.accuracy is not None
    ]
    rows.sort(key=lambda row: row[:1:-1])  # by what the most leaves know, then the fewest
    drawn = rows[:_CLASSES]
    figure, ax = style.axes(1.1 + 0.24 * len(drawn))
    places = range(len(drawn))
    names, _, *columns = zip(*drawn, strict=True)
    labels = [style.leaves(size) for size in sizes]
    ax.hlines(places, columns[0], columns[-1], color=style.MUTED, linewidth=1.4, zorder=2)
    looks = [("s", style.SERIES[1], 4.5), ("o", style.SERIES[0], 6)][-len(sizes) :]
    for label, values, (marker, colour, width) in zip(labels, columns, looks, strict=True):
        look: dict[str, Any] = {"color": colour, "markersize": width, "linestyle": "none"}
        ax.plot(values, places, marker, label=label, zorder=3, **look)
    ax.set_yticks(places, [style.short(each, 22) for each in names])
    ax.invert_yaxis()
    ax.set_xlabel("accuracy, %")
    style.legend_below(figure)
    headings: list[AnyColumn] = [
        "class",
        ("images", ",d"),
        *((f"{label} %", ".2f") for label in labels),
    ]
    text = "Of the images of each class, how many are answered rightly; the lowest first."
    if len(rows) > len(drawn):
        text += f" Of {len(rows):,} classes the lowest {len(drawn)} are drawn."
    if count > len(rows):
        text += f" {count - len(rows):,} classes have no held-out image."
    return Chart(name, title, text, figure, Table.of(headings, rows))


def has_matrix(classes: Sequence[str]) -> bool:
    """Whether there are few enough classes for a matrix that can be read."""
    return len(classes) <= _MATRIX
