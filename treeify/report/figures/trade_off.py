"""Accuracy against cost: the curves of nested sizes beside everything they compete with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes

from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table
from treeify.report.series import BaseModel, BudgetPoint, Curve, PublishedSeries

Unit = Literal["MACs", "ms"]
_AXIS = {"MACs": "MACs per image", "ms": "milliseconds per image"}
_FORMAT = {"MACs": ",.0f", "ms": ".3f"}

# Labels of points that are nearer would overlap; fractions of the axes.
_NEAR = 0.1


@style.in_style
def trade_off(
    curves: Sequence[Curve],
    *,
    unit: Unit = "MACs",
    base: BaseModel | None = None,
    budgets: Sequence[BudgetPoint] = (),
    published: Sequence[PublishedSeries] = (),
    name: str = "trade_off",
    title: str = "Accuracy against MACs",
    note: str = "",
) -> Chart:
    """Accuracy of every nested size against its cost.

    Args:
        curves: accuracy in percent over costs in `unit`.
        unit: of all costs.
        base: the base model; the axis above counts as many independent networks.
        budgets: mean costs of images that stop by confidence.
        published: points of other models, costs in MACs.
        name: of the chart.
        title: of the chart.
        note: what else a reader should know, sentences.
    """
    figure, ax = style.axes(3.5 + 0.14 * len(published))
    for index, curve in enumerate(curves):
        draw_curve(ax, index, curve)
    ax.margins(y=0.12)
    _draw_budgets(ax, budgets, [curve.name for curve in curves])
    _draw_published(ax, published, len(curves))
    style.log_costs(ax.xaxis, style.count if unit == "MACs" else style.number)
    ax.set_xlabel(_AXIS[unit])
    ax.set_ylabel("accuracy, %")
    if base is not None:
        _draw_base(ax, base, sorted({size for curve in curves for size in curve.leaves}))
    if not any(curve.has_spread for curve in curves):  # else bands show what is noise
        style.accuracies(ax.yaxis)
    if len(curves) == 1:
        _label_sizes(ax, curves[0])
    style.legend_below(figure)
    table = _table(curves, unit, base, budgets, published)
    text = _description(curves, unit, base, budgets, published)
    return Chart(name, title, f"{text} {note}".strip(), figure, table)


def _table(
    curves: Sequence[Curve],
    unit: Unit,
    base: BaseModel | None,
    budgets: Sequence[BudgetPoint],
    published: Sequence[PublishedSeries],
) -> Table:
    """Every point that is drawn, and what as many networks cost."""
    rows = [
        *_curve_rows(curves),
        *_base_rows(base, curves),
        *(
            (f"{point.curve}, budgets", None, point.cost, point.accuracy, None, None)
            for point in budgets
        ),
    ]
    rows = [(*row, None) for row in rows]
    rows += [
        (series.name, None, *point, None, None, f"{series.kind}: {series.source}")
        for series in published
        for point in series.points
    ]
    columns: list[AnyColumn] = [
        "series",
        ("leaves", "d"),
        (unit, _FORMAT[unit]),
        ("accuracy %", ".2f"),
        ("least", ".2f"),
        ("most", ".2f"),
        "source",
    ]
    return without_empty(Table.of(columns, rows))


def draw_curve(ax: Axes, index: int, curve: Curve) -> None:
    """A curve over a logarithmic axis of costs, with a band over its seeds."""
    ax.set_xscale("log")
    means = [value.mean for value in curve.values]
    ax.plot(curve.costs, means, label=style.short(curve.name), zorder=3, **style.line(index))
    if curve.has_spread:
        low, high = zip(*((value.low, value.high) for value in curve.values), strict=True)
        colour = style.colour(index)
        ax.fill_between(curve.costs, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def without_empty(table: Table) -> Table:
    """A table without the columns that hold nothing."""
    kept = [
        index
        for index in range(len(table.columns))
        if any(row[index] is not None for row in table.rows)
    ]
    return Table(
        tuple(table.columns[index] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in table.rows),
    )


def _label_sizes(ax: Axes, curve: Curve) -> None:
    """How many leaves each point has; of several curves this would be too much to read."""
    labelled: list[tuple[float, float]] = []
    for size, cost, value in zip(curve.leaves, curve.costs, curve.values, strict=True):
        x, y = ax.transAxes.inverted().transform(ax.transData.transform((cost, value.mean)))
        if any(abs(x - other) < _NEAR and abs(y - above) < _NEAR for other, above in labelled):
            continue  # the label of a point beside it is there
        labelled.append((x, y))
        ax.annotate(
            "1 leaf" if size == 1 else f"{size}",
            (cost, value.mean),
            xytext=(5, -3),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=8,
            color=style.MUTED,
        )


def _draw_base(ax: Axes, base: BaseModel, sizes: Sequence[int]) -> None:
    """The base model, and above the axes what as many independent networks cost."""
    if base.accuracy is None:
        label = f"{base.name} (accuracy not known)"
        ax.axvline(base.cost, color=style.MUTED, linestyle=(0, (4, 3)), linewidth=1, label=label)
    else:
        points: dict[str, Any] = {"marker": "*", "markersize": 11, "linestyle": "none"}
        ax.plot([base.cost], [base.accuracy], color=style.INK, label=base.name, zorder=4, **points)
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0.9 * base.cost), max(right, 1.1 * base.cost * sizes[-1]))
    for size in sizes[1:]:
        cost = base.cost * size
        ax.axvline(cost, color=style.GRID, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    top = ax.secondary_xaxis("top")
    top.set_xticks([base.cost * size for size in sizes], [str(size) for size in sizes])
    top.minorticks_off()
    top.set_xlabel("the cost of as many independent networks")
    top.spines["top"].set_visible(True)


def _draw_budgets(ax: Axes, budgets: Sequence[BudgetPoint], names: Sequence[str]) -> None:
    for name in dict.fromkeys(point.curve for point in budgets):
        points = sorted((point.cost, point.accuracy) for point in budgets if point.curve == name)
        costs, accuracies = zip(*points, strict=True)
        ax.plot(
            costs,
            accuracies,
            color=style.colour(names.index(name)) if name in names else style.MUTED,
            marker="x",
            linestyle=(0, (1, 1.2)),
            linewidth=1.2,
            label=f"{style.short(name)}, budgets",
            zorder=3,
        )


def _draw_published(ax: Axes, published: Sequence[PublishedSeries], before: int) -> None:
    """Points of others, with open marks and in the colours after those of `before` curves."""
    for index, series in enumerate(published, before):
        costs, accuracies = zip(*series.points, strict=True)
        digitised = ", read off a plot" if series.kind == "digitised" else ""
        look = style.line(index) | {"linestyle": (0, (1, 1)), "linewidth": 1, "markersize": 4}
        label = style.short(series.name) + digitised
        ax.plot(costs, accuracies, markerfacecolor=style.PAPER, label=label, zorder=2, **look)


def _curve_rows(curves: Sequence[Curve]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for curve in curves:
        for size, cost, value in zip(curve.leaves, curve.costs, curve.values, strict=True):
            band = (value.low, value.high) if curve.has_spread else (None, None)
            rows.append((curve.name, size, cost, value.mean, *band))
    return rows


def _base_rows(base: BaseModel | None, curves: Sequence[Curve]) -> list[tuple[Any, ...]]:
    if base is None:
        return []
    rows: list[tuple[Any, ...]] = [(base.name, None, base.cost, base.accuracy, None, None)]
    sizes = sorted({size for curve in curves for size in curve.leaves})
    rows += [
        (f"{size} independent networks", None, size * base.cost, None, None, None)
        for size in sizes[1:]
    ]
    return rows


def _description(
    curves: Sequence[Curve],
    unit: Unit,
    base: BaseModel | None,
    budgets: Sequence[BudgetPoint],
    published: Sequence[PublishedSeries],
) -> str:
    cost = "MACs" if unit == "MACs" else "time"
    sentences = [
        f"Each point is a nested size: the mean logits of its first leaves, against their {cost}"
        " for one image (logarithmic)."
    ]
    if any(curve.has_spread for curve in curves):
        sentences.append("Lines are means over seeds, bands reach from the least to the most.")
    if base is not None:
        sentences.append(
            "Above, dashed: what as many independent networks would cost, each a base model."
        )
    if budgets:
        sentences.append(
            "Crosses: images that stop as soon as they are confident enough, at their mean cost."
        )
    if published:
        sentences.append("Open marks are not measured here, but as others published them.")
    sources = dict.fromkeys((series.source, series.kind) for series in published)
    for source, kind in sources:
        names = [each.name for each in published if (each.source, each.kind) == (source, kind)]
        how = "printed in" if kind == "printed" else "read off a plot in"
        sentences.append(f"{'; '.join(names)}: {how} {source}.")
    return " ".join(sentences)
