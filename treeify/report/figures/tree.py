"""The tree: its levels and branches, what they cost and how they run."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table
from treeify.report.figures.trade_off import without_empty
from treeify.report.results import ExportedStep, Level

# Drawn beside each other; of more branches these many, and a mark that there are more.
_MOST = 32
_FORMS = {"shared": 0, "packed": 0, "looped": 1}


@style.in_style
def tree(levels: Sequence[Level], *, name: str = "tree", title: str = "The tree") -> Chart:
    """Levels from left to right with their branches, as thick as their MACs.

    Args:
        levels: of the tree.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(3.4)
    _draw_branches(ax, levels)
    ax.set_xlim(-0.1, len(levels) - 0.1)
    ax.set_ylim(1.03, -0.03)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(axis="x", length=0)
    places = [number + 0.4 for number in range(len(levels))]
    ax.set_xticks(places, [_caption(level, len(levels)) for level in levels])
    table = Table.of(
        [
            ("level", "d"),
            "begins at",
            ("branches", ",d"),
            ("MACs of one", ",d"),
            ("MACs of all", ",d"),
            ("parameters", ",d"),
            ("bytes", ",d"),
            "runs",
        ],
        [
            (
                level.number,
                level.split or "the image",
                level.branches,
                level.macs,
                None if level.macs is None else level.macs * level.branches,
                level.parameters,
                level.size,
                level.execution,
            )
            for level in levels
        ],
    )
    text = (
        "From the image on the left to the leaves on the right. A branch has parameters of its own;"
        " the path from the left to a leaf is one whole network."
    )
    if any(level.macs for level in levels):
        text += " Lines are the thicker, the more MACs a branch takes."
    if any(level.execution == "looped" for level in levels):
        text += " Dashed levels run branch by branch, the others all branches at once."
    if levels and levels[-1].branches > _MOST:
        text += f" Of {levels[-1].branches:,} leaves the first {_MOST} are drawn."
    return Chart(name, title, text, figure, without_empty(table))


def _draw_branches(ax: Axes, levels: Sequence[Level]) -> None:
    leaves = levels[-1].branches
    drawn = min(_MOST, leaves)
    most = max((level.macs or 0 for level in levels), default=0)
    parents: list[float] = []
    above = leaves  # below a branch of the level before
    for level in levels:
        below = leaves // level.branches
        # In the middle of its leaves that are drawn.
        heights = [
            (start + min(start + below, drawn)) / 2 / drawn for start in range(0, drawn, below)
        ]
        width = 1.0 + 7.0 * (level.macs or 0) / most if most else 2.0
        for height in heights:
            ax.plot(
                [level.number, level.number + 0.8],
                [height, height],
                color=style.colour(_FORMS.get(level.execution or "", 0)),
                linewidth=min(width, 120 / len(heights)),
                linestyle=(0, (1.2, 0.4)) if level.execution == "looped" else "-",
                solid_capstyle="round",
            )
        for index, height in enumerate(heights if parents else ()):
            parent = parents[index * below // above]
            ends = [level.number - 0.2, level.number], [parent, height]
            ax.plot(*ends, color=style.MUTED, linewidth=0.8, zorder=1)
        parents, above = heights, below


def _caption(level: Level, levels: int) -> str:
    branches = "1 branch" if level.branches == 1 else f"{level.branches:,} branches"
    lines = [f"level {level.number}", branches if levels < 6 else f"× {level.branches:,}"]  # noqa: RUF001
    if level.macs is not None:
        lines.append(f"{style.count(level.macs * level.branches)} MACs")
    return "\n".join(lines)


@style.in_style
def level_costs(
    levels: Sequence[Level], *, name: str = "level_costs", title: str = "Where the cost is"
) -> Chart:
    """What fraction of all MACs, parameters and bytes each level has.

    Args:
        levels: of the tree, with their costs.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(0.9 + 0.34 * len(levels))
    columns = {
        "MACs": [(level.macs or 0) * level.branches for level in levels],
        "parameters": [level.parameters or 0 for level in levels],
        "bytes": [level.size or 0 for level in levels],
    }
    fractions = {
        key: [100 * value / max(1, sum(values)) for value in values]
        for key, values in columns.items()
    }
    for index, (key, values) in enumerate(fractions.items()):
        places = [number + 0.27 * (index - 1) for number in range(len(levels))]
        ax.barh(places, values, height=0.25, color=style.colour(index), label=key)
    ax.set_yticks(
        range(len(levels)),
        [f"level {level.number} × {level.branches}" for level in levels],  # noqa: RUF001
    )
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("% of the whole ensemble")
    style.legend_below(figure, columns=3)
    rows = [
        (level.number, *(fractions[key][index] for key in columns))
        for index, level in enumerate(levels)
    ]
    headings: list[AnyColumn] = [("level", "d"), *((f"{key} %", ".1f") for key in columns)]
    text = "Each level's fraction of all MACs for one image, of all parameters and of all bytes."
    return Chart(name, title, text, figure, Table.of(headings, rows))


@style.in_style
def export_steps(
    steps: Sequence[ExportedStep], *, name: str = "steps", title: str = "The files of the export"
) -> Chart:
    """What each step of an export adds: MACs and bytes.

    Args:
        steps: in their order.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(0.9 + 0.4 * len(steps))
    columns = {
        "MACs": [step.macs for step in steps],
        "bytes": [step.size for step in steps],
    }
    for index, (key, values) in enumerate(columns.items()):
        places = [number + 0.36 * (index - 0.5) for number in range(len(steps))]
        percent = [100 * value / max(1, sum(values)) for value in values]
        ax.barh(places, percent, height=0.33, color=style.colour(index), label=key)
    ax.set_yticks(range(len(steps)), [f"{step.start} to {step.leaves}" for step in steps])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("% of the whole export")
    ax.set_ylabel("leaves")
    style.legend_below(figure, columns=2)
    rows = [
        (step.file, step.start, step.leaves, step.macs, step.parameters, step.size, step.difference)
        for step in steps
    ]
    headings: list[AnyColumn] = [
        "file",
        ("from", "d"),
        ("to leaves", "d"),
        ("MACs", ",d"),
        ("parameters", ",d"),
        ("bytes", ",d"),
        ("largest difference", ".2g"),
    ]
    text = (
        "Each file goes on from the answer of the one before. Largest difference: of a leaf's"
        " logits from PyTorch's, in fractions of the largest logit, compared when it was written."
    )
    return Chart(name, title, text, figure, without_empty(Table.of(headings, rows)))
