"""Lines of sparks: what they show, and where a terminal has no such characters."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from runner import run

from treeify.cli.sparks import live_line, spark, summary
from treeify.cli.train import _Display
from treeify.evaluation.metrics import Score
from treeify.training.events import Epoch
from treeify.training.run_directory import RunDirectory


def epochs(*losses: float) -> list[Epoch]:
    return [
        Epoch(
            number,
            10 * number,
            1.0,
            0.0,
            loss,
            (Score(1, 50.0, 1.0, 1.0, 0.0),),
            (Score(1, 10.0 * number, 1.0, 1.0, 0.0), Score(4, 20.0 * number, 1.0, 1.0, 0.1)),
            0,
        )
        for number, loss in enumerate(losses, 1)
    ]


def test_the_least_is_lowest_and_the_largest_highest() -> None:
    assert spark([0, 1, 2, 3, 4, 5, 6, 7], "utf-8") == "▁▂▃▄▅▆▇█"
    assert spark([3.0, 1.0, 2.0], "utf-8") == "█▁▅"
    assert spark([2.5, 2.5], "utf-8") == "▁▁"
    assert spark([], "utf-8") == ""
    assert spark([float("nan"), 1.0, float("inf"), 2.0], "utf-8") == "▁█"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "no-such-encoding"])
def test_a_terminal_without_blocks_gets_ascii(encoding: str) -> None:
    line = spark([0, 1, 2, 3, 4, 5, 6, 7], encoding)
    assert line.isascii()
    assert len(set(line)) == 8
    for text in (live_line(epochs(2.0, 1.0), encoding), *summary(epochs(2.0, 1.0), encoding)):
        assert text.isascii()


def test_many_values_are_averaged_by_neighbours() -> None:
    assert spark([0, 0, 7, 7, 3.5, 3.5], "utf-8", width=3) == "▁█▅"
    for count in (19, 20, 21, 39, 200):
        assert len(spark(range(count), "utf-8")) == min(count, 20)


def test_lines_of_a_run_fit_80_columns() -> None:
    many = epochs(5.0, 4.0, 3.0, 2.0, 1.0) * 60
    line = live_line(many, "utf-8")
    assert len(line) <= 80
    assert line.startswith("loss ")
    assert line.endswith("100.0 %")
    assert [len(text) <= 80 for text in summary(many, "utf-8")] == [True, True]
    assert live_line(epochs(1.0), "utf-8") == ""
    assert summary(epochs(1.0), "utf-8") == []
    loss, accuracy = summary(epochs(2.0, 1.5, 1.0), "utf-8")
    assert loss.endswith("█▅▁  2.000 to 1.000")
    assert accuracy.endswith("▁▅█  20.00 to 60.00 %, 4 leaves")


def test_a_terminal_shows_them_below_the_bar() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with _Display(console) as display:
        for epoch in epochs(2.0, 1.0):
            display.finished_epoch(epoch)
        display.progress.refresh()
    assert "loss █▁ 1.00  held out ▁█ 40.0 %" in file.getvalue()


def test_train_ends_with_the_curves_of_the_whole_run(recipe_file: Path) -> None:
    result = run("train", str(recipe_file), "schedule.epochs=2", "--out", "here")
    assert result.exit_code == 0, result.output
    went_on = run("train", "--resume", "here", "--more-epochs", "1")
    assert went_on.exit_code == 0, went_on.output
    rows = RunDirectory(Path("here")).metrics()
    assert len(rows) == 3
    for line in summary(rows[:2], "utf-8"):
        assert line in result.output
    for line in summary(rows, "utf-8"):
        assert line in went_on.output
