"""How a conversion went: what runs packed at each level, and how exact it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table
from treeify.report.results import Level

# What was compared, by the names of `treeify.parity.verify.Figures`.
CHECKS = {
    "leaf_eval": "leaves, evaluation",
    "leaf_train": "leaves, training",
    "buffers": "running statistics",
    "prefix": "nested sizes",
    "gradient": "gradients",
}


@style.in_style
def packed_levels(
    levels: Sequence[Level], *, name: str = "packed", title: str = "What runs packed"
) -> Chart:
    """The fraction of each branched level's MACs whose operations have a rule for all branches.

    Args:
        levels: of the tree.
        name: of the chart.
        title: of the chart.
    """
    branched = [level for level in levels if level.packed is not None]
    figure, ax = style.axes(0.8 + 0.32 * max(1, len(branched)))
    fractions = [100 * (level.packed or 0) for level in branched]
    places = range(len(branched))
    ax.barh(places, [100] * len(branched), height=0.6, color=style.GRID, zorder=1)
    bars = ax.barh(places, fractions, height=0.6, color=style.SERIES[0], zorder=2)
    ax.bar_label(bars, [f"{value:.1f} %" for value in fractions], padding=4, fontsize=8)
    ax.set_yticks(places, [f"level {level.number} × {level.branches}" for level in branched])  # noqa: RUF001
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_xlim(0, 118)
    ax.set_xticks(range(0, 101, 20))
    ax.set_xlabel("% of the level's MACs")
    headings: list[AnyColumn] = [("level", "d"), ("branches", ",d"), ("packed %", ".2f")]
    rows = [(level.number, level.branches, 100 * (level.packed or 0)) for level in branched]
    text = (
        "Packed operations compute all branches of a level at once, as a grouped convolution does;"
        " the others run branch by branch."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))


@style.in_style
def parity(
    deviations: Mapping[str, float],
    *,
    name: str = "parity",
    title: str = "How exact it is",
) -> Chart:
    """The largest deviations from the untouched architecture, in multiples of the tolerance.

    Args:
        deviations: by what was compared.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(0.9 + 0.3 * len(deviations))
    places = range(len(deviations))
    values = list(deviations.values())
    floor = 1e-6
    ax.set_xscale("log")
    ax.hlines(places, floor, [max(value, floor) for value in values], color=style.MUTED, lw=1)
    ax.plot([max(value, floor) for value in values], places, "o", color=style.SERIES[0], zorder=3)
    ax.axvline(1, color=style.SERIES[1], linewidth=1.4)
    ax.annotate(
        "tolerance",
        (1, -0.5),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=style.INK,
    )
    names = [CHECKS.get(key, key) for key in deviations]
    ax.set_yticks(places, names)
    ax.set_ylim(len(deviations) - 0.5, -0.9)
    ax.set_xlim(floor, 4)
    ax.set_xticks([1e-6, 1e-4, 1e-2, 1], ["10⁻⁶", "10⁻⁴", "0.01", "1"])
    ax.minorticks_off()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("largest deviation, multiples of the tolerance")
    rows = list(zip(names, values, strict=True))
    headings: list[AnyColumn] = ["compared", ("multiples of the tolerance", ".3g")]
    text = (
        "Every leaf is compared with the base model's own code and that leaf's weights. The"
        " tolerance is 1e-5 + 1e-4 × |value|, the former scaled down for small outputs."  # noqa: RUF001
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))
