"""The picture of a plan: every tree stands where it costs and owns what the plan says."""

import small

import treeify
from treeify.report.figures.plan import plan

PLANNED = treeify.plan(small.build(), example_input=small.EXAMPLE, leaves=(2, 4))


def test_every_tree_is_drawn_where_it_stands() -> None:
    chart = plan(PLANNED)
    (ax,) = chart.figure.axes
    drawn = {
        tuple(point)
        for line in ax.lines
        if str(line.get_label()).endswith(" leaves")
        for point in line.get_xydata().tolist()
    }
    assert drawn == {(tree.nested[-1].macs, 100 * tree.mean_own) for tree in PLANNED.candidates}
    numbers = {text.get_text(): text.xy for text in ax.texts}
    for number, tree in enumerate(PLANNED.candidates, 1):
        assert numbers[str(number)] == (tree.nested[-1].macs, 100 * tree.mean_own)


def test_the_pick_and_the_budget_are_marked() -> None:
    chart = plan(PLANNED.pick(2))
    lines = {str(line.get_label()): line for line in chart.figure.axes[0].lines}
    chosen = PLANNED.candidates[1]
    assert lines["the pick"].get_xydata().tolist() == [
        [chosen.nested[-1].macs, 100 * chosen.mean_own]
    ]
    assert lines[f"at most {PLANNED.budget}"].get_xdata()[0] == PLANNED.budget.most


def test_the_table_has_a_row_for_every_tree() -> None:
    rows = plan(PLANNED).table.cells
    assert [row[0] for row in rows] == [", ".join(tree.splits) for tree in PLANNED.candidates]
    assert {row[-1] for row in rows} == {"-"}
