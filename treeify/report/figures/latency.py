"""How long answers take here: the calibration as a picture, and what a deadline buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator, ScalarFormatter

from treeify.anytime.confidence import Budget
from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table
from treeify.report.figures.trade_off import without_empty
from treeify.report.results import LatencyTable


@style.in_style
def latencies(
    table: LatencyTable, *, name: str = "latencies", title: str = "How long answers take"
) -> Chart:
    """The milliseconds of every transition: straight to a size, and from one size to the next.

    Args:
        table: as calibrated.
        name: of the chart.
        title: of the chart.
    """
    straight = [row for row in table.transitions if row.start == 0]
    further = [row for row in table.transitions if row.start]
    figure, ax = style.axes(1.0 + 0.26 * len(table.transitions))
    place = 0
    for index, (label, rows) in enumerate(
        (("straight from the image", straight), ("from one size to the next", further))
    ):
        places = range(place, place + len(rows))
        place += len(rows)
        typical = [1e3 * row.typical for row in rows]
        ax.barh(places, typical, height=0.62, color=style.colour(index), label=label, zorder=2)
        beyond = [max(0.0, 1e3 * (row.slow - row.typical)) for row in rows]
        ax.errorbar(
            typical,
            places,
            xerr=[[0.0] * len(rows), beyond],
            fmt="none",
            color=style.INK,
            elinewidth=1.1,
            capsize=3,
            zorder=3,
        )
    ordered = [*straight, *further]
    ax.set_yticks(range(place), [f"{row.start} → {row.stop}" for row in ordered])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_ylabel("leaves")
    ax.set_xlabel("ms")
    style.legend_below(figure)
    headings: list[AnyColumn] = [
        ("from leaves", "d"),
        ("to leaves", "d"),
        ("median ms", ".3f"),
        ("99th percentile ms", ".3f"),
        ("margin", ".2f"),
    ]
    cells = [
        (row.start, row.stop, 1e3 * row.typical, 1e3 * row.slow, row.margin) for row in ordered
    ]
    text = (
        f"{table.situation}: medians of {table.repeats} rounds, whiskers to the 99th percentile;"
        f" {table.machine}; {table.plan}."
    )
    return Chart(name, title, text, figure, Table.of(headings, cells))


@style.in_style
def deadlines(
    table: LatencyTable,
    accuracies: Mapping[int, float],
    *,
    name: str = "deadlines",
    title: str = "What a deadline buys",
) -> Chart:
    """How many leaves go straight by each deadline, with the margin that keeps it.

    Args:
        table: as calibrated.
        accuracies: of the sizes, in percent, as far as they are known.
        name: of the chart.
        title: of the chart.
    """
    steps = _bought(table)
    figure, ax = style.axes(2.8)
    times = [time for time, _ in steps]
    leaves = [float(size) for _, size in steps]
    end = 1.25 * times[-1]
    ax.step([*times, end], [*leaves, leaves[-1]], where="post", color=style.SERIES[0])
    ax.plot(times, leaves, "o", color=style.SERIES[0])
    for time, size in steps:
        if (accuracy := accuracies.get(size)) is not None:
            ax.annotate(
                f"{accuracy:.1f} %",
                (time, size),
                xytext=(5, -4),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=style.MUTED,
            )
    ax.set_yscale("log", base=2)
    sizes = [size for _, size in steps]
    ax.set_yticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_ylim(0.62 * sizes[0], 1.4 * sizes[-1])
    ax.set_xlim(0, end)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_xlabel("deadline, ms")
    ax.set_ylabel("leaves")
    headings: list[AnyColumn] = [
        ("deadline ms from", ".3f"),
        ("leaves", "d"),
        ("accuracy %", ".2f"),
    ]
    rows = [(time, size, accuracies.get(size)) for time, size in steps]
    text = (
        "From this deadline on, predict(x, deadline=...) goes straight to so many leaves on an"
        " otherwise idle machine: the median times the margin that keeps deadlines 99 times in 100."
    )
    if table.batch > 1:
        text += f" All of it for {table.batch} images together."
    return Chart(name, title, text, figure, without_empty(Table.of(headings, rows)))


def _bought(table: LatencyTable) -> list[tuple[float, int]]:
    """Milliseconds from which on a deadline gets more leaves, and how many; both increase."""
    reached = [
        (1e3 * row.typical * row.margin, row.stop) for row in table.transitions if not row.start
    ]
    best: list[tuple[float, int]] = []
    for time, size in sorted(reached):
        if not best or size > best[-1][1]:
            best.append((time, size))
    return best


def first_of(tables: Sequence[LatencyTable]) -> LatencyTable | None:
    """The table of single images, or else the first."""
    single = [table for table in tables if table.batch == 1]
    return next(iter((*single, *tables)), None)


@style.in_style
def budgets(
    chosen: Sequence[Budget], *, name: str = "budgets", title: str = "Who stops where"
) -> Chart:
    """At which size images stop, for every mean of MACs that thresholds were chosen for.

    Args:
        chosen: as `treeify calibrate` keeps them.
        name: of the chart.
        title: of the chart.
    """
    ordered = sorted(chosen, key=lambda budget: budget.target_macs)
    sizes = ordered[0].sizes
    figure, ax = style.axes(max(2.0, 1.2 + 0.3 * len(ordered)))
    places = range(len(ordered))
    left = [0.0] * len(ordered)
    for index, size in enumerate(sizes):
        widths = [
            100 * budget.fractions[index] if budget.sizes == sizes and budget.fractions else 0.0
            for budget in ordered
        ]
        shade = 0.25 + 0.75 * index / max(1, len(sizes) - 1)
        leaves = str(size)
        ax.barh(places, widths, 0.66, left, color=style.SERIES[0], alpha=shade, label=leaves, lw=0)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    ax.set_yticks(places, [style.count(budget.target_macs) for budget in ordered])
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the images")
    ax.set_ylabel("mean MACs")
    style.legend_below(figure, columns=len(sizes), title="leaves", handlelength=1.2)
    headings: list[AnyColumn] = [
        ("target MACs", ",d"),
        ("mean MACs", ",.0f"),
        ("accuracy %", ".2f"),
        *((f"stop at {size} %", ".1f") for size in sizes),
        ("thresholds", ""),
    ]
    rows = [
        (
            budget.target_macs,
            budget.macs,
            100 * budget.accuracy,
            *(100 * fraction for fraction in budget.fractions),
            ", ".join(f"{threshold:.4f}" for threshold in budget.thresholds),
        )
        for budget in ordered
        if budget.sizes == sizes and len(budget.fractions) == len(sizes)
    ]
    text = (
        "Images stop as soon as the likeliest class is probable enough; thresholds let their mean"
        " cost be the target. Accuracy and fractions: on images that they were not chosen on."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))
