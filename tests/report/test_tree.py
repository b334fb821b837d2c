"""The tree: branches stand between their leaves, and of many leaves the first are drawn."""

import pytest
from matplotlib.figure import Figure

from treeify.report.figures.tree import tree
from treeify.report.results import Level
from treeify.tree import Tree


def heights(figure: Figure) -> list[list[float]]:
    """Where the branches of each level are, from the top."""
    levels: dict[float, list[float]] = {}
    for line in figure.axes[0].lines:
        (start, stop), (one, other) = line.get_data()
        if stop - start > 0.5:  # else it joins two levels
            assert one == other
            levels.setdefault(start, []).append(one)
    return [levels[start] for start in sorted(levels)]


def joined(figure: Figure) -> list[tuple[float, float]]:
    """The ends of the lines between levels."""
    lines = (line.get_data() for line in figure.axes[0].lines)
    return [tuple(ys) for (start, stop), ys in lines if stop - start < 0.5]


@pytest.mark.parametrize("fanouts", [(), (2,), (3, 2), (2, 2, 2, 2), (3, 3, 5), (8, 8), (40,)])
def test_every_branch_stands_between_its_leaves(fanouts: tuple[int, ...]) -> None:
    shape = Tree(fanouts)
    levels = [
        Level(number, f"block{number}" if number else None, branches, macs=10 + number)
        for number, branches in enumerate(shape.branches)
    ]
    chart = tree(levels)
    drawn = heights(chart.figure)
    count = min(32, shape.leaves)
    assert len(drawn[-1]) == count
    assert drawn[-1] == pytest.approx([(leaf + 0.5) / count for leaf in range(count)])
    for number, places in enumerate(drawn):
        below = shape.leaves_below(number)
        assert len(places) == -(-count // below)
        for branch, place in enumerate(places):
            own = drawn[-1][branch * below : (branch + 1) * below]
            assert place == pytest.approx((own[0] + own[-1]) / 2)
    assert len(joined(chart.figure)) == sum(map(len, drawn[1:]))
    for parent, child in joined(chart.figure):
        assert any(parent in places for places in drawn)
        assert any(child in places for places in drawn)
    said = f"Of {shape.leaves} leaves the first 32 are drawn" in chart.description
    assert said == (shape.leaves > 32)
