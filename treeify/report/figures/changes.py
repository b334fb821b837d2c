"""What more leaves change: images that become right, and images that become wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table


@style.in_style
def changes(
    sizes: Sequence[int],
    correct: Tensor,
    *,
    name: str = "changes",
    title: str = "What more leaves change",
) -> Chart:
    """How many images each size makes right, and how many it makes wrong.

    Args:
        sizes: the `S` nested sizes.
        correct: whether each size answers rightly, `[S, N]`.
        name: of the chart.
        title: of the chart.
    """
    steps = list(pairwise(sizes))
    right = [int((now & ~before).sum()) for before, now in pairwise(correct)]
    wrong = [int((before & ~now).sum()) for before, now in pairwise(correct)]
    figure, ax = style.axes(2.8)
    places = range(len(steps))
    for values, sign, index, label in (
        (right, 1, 2, "become right"),
        (wrong, -1, 1, "become wrong"),
    ):
        heights = [sign * value for value in values]
        bars = ax.bar(places, heights, width=0.62, color=style.SERIES[index], label=label)
        ax.bar_label(bars, [f"{value:,}" if value else "" for value in values], padding=2)
    ax.axhline(0, color=style.MUTED, linewidth=0.8)
    ax.margins(y=0.18)
    ax.set_xticks(places, [f"{start} to {stop}" for start, stop in steps])
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("leaves")
    ax.set_ylabel("images")
    style.legend_below(figure)
    headings: list[AnyColumn] = [
        ("from leaves", "d"),
        ("to leaves", "d"),
        ("become right", ",d"),
        ("become wrong", ",d"),
        ("net", "+,d"),
        ("still wrong", ",d"),
    ]
    rows = [
        (*step, better, worse, better - worse, int((~correct[index]).sum()))
        for index, (step, better, worse) in enumerate(zip(steps, right, wrong, strict=True), 1)
    ]
    text = (
        f"Of {correct.shape[1]:,} images, those whose answer becomes right (up) or wrong (down)"
        " when leaves are added."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))
