"""Training curves: losses stand at their epochs, also where a line of the metrics is lost."""

from dataclasses import replace
from pathlib import Path

from treeify.report.figures.training import loss
from treeify.training.run_directory import RunDirectory


def test_losses_stand_at_their_own_epochs_where_one_is_lost(run: Path) -> None:
    first, second = RunDirectory(run).metrics()
    third = replace(second, epoch=3, loss=0.25)
    damaged, whole = [first, third], [first, second, third]
    chart = loss({"damaged": [damaged]})
    assert [row[:3] for row in chart.table.rows] == [
        ("damaged", 1, first.loss),
        ("damaged", 3, third.loss),
    ]
    (line,) = chart.figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 3]
    rows = loss({"both": [damaged, whole]}).table.rows
    assert [(row[1], row[3]) for row in rows] == [(1, 2), (2, 1), (3, 2)]
    assert rows[1][2] == second.loss
