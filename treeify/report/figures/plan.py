"""The trees of a plan: what each costs against how much of a leaf's MACs newcomers own."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from treeify.planning.limits import MACS, MB, MS, PARAMS
from treeify.planning.split_plan import RANKING, Candidate, SplitPlan
from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table

_AXIS = {
    MACS: "MACs of all leaves per image",
    MS: "milliseconds of all leaves, forecast",
    PARAMS: "parameters",
    MB: "megabytes of parameters and buffers",
}


@style.in_style
def plan(result: SplitPlan, *, name: str = "plan") -> Chart:
    """Every candidate of a plan by its cost and its mean own fraction, and the pick.

    Args:
        result: the plan.
        name: of the chart.
    """
    quantity = result.budget.quantity
    figure, ax = style.axes(3.6)
    sizes = sorted({tree.leaves for tree in result.candidates})
    for index, size in enumerate(sizes):
        trees = [tree for tree in result.candidates if tree.leaves == size]
        trees.sort(key=lambda tree: tree.cost(quantity))
        costs = [tree.cost(quantity) for tree in trees]
        owned = [100 * tree.mean_own for tree in trees]
        ax.plot(costs, owned, label=f"{size} leaves", zorder=3, **style.line(index))
    _number(ax, result)
    _mark_pick(ax, result.chosen, quantity)
    limit: dict[str, Any] = {"color": style.MUTED, "linestyle": (0, (4, 3)), "linewidth": 1}
    ax.axvline(result.budget.most, label=f"at most {result.budget}", **limit)
    ax.xaxis.set_major_formatter(style.number if quantity in (MS, MB) else style.count)
    ax.set_xlabel(_AXIS[quantity])
    ax.set_ylabel("mean own fraction, %")
    ax.set_ylim(bottom=0)
    style.legend_below(figure, 3)
    return Chart(
        name,
        f"Trees of {style.short(result.model)} within {result.budget}",
        "Numbers are rows of the table; a ring is around the pick. " + RANKING,
        figure,
        _table(result),
    )


def _number(ax: Axes, result: SplitPlan) -> None:
    """The row of each candidate beside its point."""
    for number, tree in enumerate(result.candidates, 1):
        ax.annotate(
            str(number),
            (tree.cost(result.budget.quantity), 100 * tree.mean_own),
            xytext=(-5, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=style.MUTED,
        )


def _mark_pick(ax: Axes, chosen: Candidate, quantity: str) -> None:
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 12,
        "linestyle": "none",
        "fillstyle": "none",
    }
    place = ([chosen.cost(quantity)], [100 * chosen.mean_own])
    ax.plot(*place, color=style.INK, label="the pick", zorder=4, **ring)


def _table(result: SplitPlan) -> Table:
    columns: list[AnyColumn] = [
        *("splits", ("leaves", "d"), ("MACs", ",d"), ("parameters", ",d"), ("MB", ",.1f")),
        *(("own %", ".1f"), ("mean own %", ".1f"), ("forecast ms", ",.1f")),
    ]
    rows = [
        (
            ", ".join(tree.splits),
            tree.leaves,
            tree.nested[-1].macs,
            tree.nested[-1].parameters,
            tree.bytes / 1e6,
            100 * tree.own,
            100 * tree.mean_own,
            None if tree.forecast is None else 1e3 * tree.forecast[-1],
        )
        for tree in result.candidates
    ]
    return Table.of(columns, rows)
