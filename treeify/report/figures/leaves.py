"""What leaves are by themselves and together, as the paper's figures 3, 4 and 9 show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from matplotlib.axes import Axes

from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table
from treeify.report.figures.trade_off import draw_curve
from treeify.report.series import Curve, Spread


@style.in_style
def leaf_accuracy(
    leaves: Sequence[int],
    nested: Sequence[Spread],
    single: Sequence[Spread],
    *,
    name: str = "leaf_accuracy",
    title: str = "Nested sizes over single leaves",
    note: str = "",
) -> Chart:
    """Accuracy of the nested sizes as a curve over every single leaf's as bars.

    Args:
        leaves: the nested sizes, increasing.
        nested: their accuracies in percent.
        single: of every leaf by itself, in the order of the tree.
        name: of the chart.
        title: of the chart.
        note: what else a reader should know, sentences.

    Source: Ruiz & Verbeek, AAAI 2021, figure 4.
    """
    figure, ax = style.axes(3.0)
    _draw_leaves(ax, leaves, nested, single)
    ax.set_xlabel("leaf, in the order of the tree; number of first leaves")
    ax.set_ylabel("accuracy, %")
    style.legend_below(figure)
    table = _leaf_table(dict(zip(leaves, nested, strict=True)), single)
    text = (
        "Bars: each leaf alone, in the order in which leaves are added. Line: the mean logits of as"
        " many first leaves. The axis does not begin at 0."
    )
    return Chart(name, title, f"{text} {note}".strip(), figure, table)


def _draw_leaves(
    ax: Axes, leaves: Sequence[int], nested: Sequence[Spread], single: Sequence[Spread]
) -> None:
    positions, means = range(1, len(single) + 1), [value.mean for value in single]
    bars: dict[str, Any] = {"color": style.SERIES[5], "alpha": 0.55, "width": 0.8}
    ax.bar(positions, means, label="single leaves", **bars)
    ax.plot(leaves, [value.mean for value in nested], label="first leaves", **style.line(0))
    if any(value.seeds > 1 for value in (*nested, *single)):
        errors = [[value.mean - value.low for value in single]]
        errors.append([value.high - value.mean for value in single])
        ax.errorbar(positions, means, errors, fmt="none", color=style.MUTED, linewidth=0.9)
        bounds = [value.low for value in nested], [value.high for value in nested]
        ax.fill_between(leaves, *bounds, color=style.SERIES[0], alpha=0.15, linewidth=0)
    low = min(value.low for value in (*nested, *single))
    high = max(value.high for value in (*nested, *single))
    margin = max(0.5, 0.15 * (high - low))
    ax.set_ylim(max(0, low - 2 * margin), min(100.5, high + margin))
    if not any(value.seeds > 1 for value in single):  # else bars of errors show what is noise
        style.accuracies(ax.yaxis)
    ax.set_xlim(0.4, len(single) + 0.6)
    ax.set_xticks(_ticks(len(single)))
    ax.grid(visible=False, axis="x")


def _leaf_table(nested: Mapping[int, Spread], single: Sequence[Spread]) -> Table:
    has_spread = any(value.seeds > 1 for value in single)
    rows = []
    for leaf, value in enumerate(single, 1):
        together = nested.get(leaf)
        row = [leaf, value.mean, together and together.mean]
        rows.append([*row, value.low, value.high] if has_spread else row)
    columns: list[AnyColumn] = [
        ("leaf or size", "d"),
        ("by itself %", ".2f"),
        ("first leaves %", ".2f"),
    ]
    if has_spread:
        columns += [("by itself, least", ".2f"), ("by itself, most", ".2f")]
    return Table.of(columns, rows)


def _ticks(leaves: int) -> list[int]:
    """Where the axis of leaves is numbered: at all of a few, else at doubling numbers."""
    if leaves <= 16:
        return list(range(1, leaves + 1))
    return [2**power for power in range(leaves.bit_length()) if 2**power <= leaves]


@style.in_style
def logit_std(
    curves: Sequence[Curve],
    *,
    name: str = "logit_std",
    title: str = "How much the leaves differ",
    note: str = "",
) -> Chart:
    """Standard deviation of the logits over the leaves of every nested size, against its MACs.

    Args:
        curves: the deviation over MACs per image.
        name: of the chart.
        title: of the chart.
        note: what else a reader should know, sentences.

    Source: Ruiz & Verbeek, AAAI 2021, figures 3 and 9.
    """
    figure, ax = style.axes(2.8)
    for index, curve in enumerate(curves):
        draw_curve(ax, index, curve)
    style.log_costs(ax.xaxis, style.count)
    ax.set_xlabel("MACs per image")
    ax.set_ylabel("logit std")
    ax.set_ylim(bottom=0, top=None if any(_positive(curve) for curve in curves) else 1)
    style.legend_below(figure)
    has_spread = any(curve.has_spread for curve in curves)
    rows = []
    for curve in curves:
        for size, cost, value in zip(curve.leaves, curve.costs, curve.values, strict=True):
            row = [curve.name, size, cost, value.mean]
            rows.append([*row, value.low, value.high] if has_spread else row)
    columns: list[AnyColumn] = ["series", ("leaves", "d"), ("MACs", ",.0f"), ("logit std", ".3f")]
    if has_spread:
        columns += [("least", ".3f"), ("most", ".3f")]
    text = (
        "Standard deviation of the logits over the leaves of a size, averaged over classes and"
        " images: 0 for one leaf, and small where leaves agree."
    )
    return Chart(name, title, f"{text} {note}".strip(), figure, Table.of(columns, rows))


def _positive(curve: Curve) -> bool:
    return max((value.mean for value in curve.values), default=-inf) > 0
