"""Grids: bands over seeds, from the runs or from the file of their results alone."""

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import runs

from treeify.errors import CheckpointError, InputError
from treeify.report.api import read
from treeify.report.grids import is_grid
from treeify.training.ablation import ablate, expand, results

GRID = """\
name: tiny
recipe: tiny.yaml
overrides: [schedule.epochs=1]
seeds: 2
variants:
  L_I: [loss.name=independent]
  L_HD: []
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `treeify ablate` leaves behind."""
    folder = tmp_path_factory.mktemp("grid")
    runs.tiny(folder)
    (folder / "grid.yaml").write_text(GRID)
    expanded = expand(folder / "grid.yaml", folder / "out")
    assert ablate(expanded)
    (folder / "out" / "results.json").write_text(json.dumps(results(expanded)))
    return folder / "out"


def rows(report: Any, name: str) -> list[dict[str, Any]]:
    (chart,) = (chart for chart in report.charts if chart.name == name)
    headings = [column.heading for column in chart.table.columns]
    return [dict(zip(headings, row, strict=True)) for row in chart.table.rows]


def test_a_grid_is_drawn_as_bands_over_its_seeds(grid: Path) -> None:
    report = read(grid)
    assert {"trade_off", "accuracy_of_sizes", "logit_std", "loss"} == report.figures.keys()
    found = json.loads((grid / "results.json").read_text(encoding="utf-8"))
    for row in rows(report, "trade_off"):
        if not row["leaves"]:
            continue
        seeds = [
            score["accuracy"]
            for run in found
            for score in run["held_out"]
            if run["variant"] == row["series"] and score["leaves"] == row["leaves"]
        ]
        assert len(seeds) == 2
        assert row["accuracy %"] == pytest.approx(mean(seeds))
        assert (row["least"], row["most"]) == (min(seeds), max(seeds))
    assert {row["runs"] for row in rows(report, "loss")} == {2}
    page = report.html()
    assert "bands reach from the least to the most" in page
    assert "What is left out" in page


def test_without_its_file_a_grid_is_read_from_its_runs(grid: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(grid, copy, symlinks=True)
    (copy / "results.json").unlink()
    assert is_grid(copy)
    assert not is_grid(copy / "L_I" / "seed0")
    with_file, without = (rows(read(path), "logit_std") for path in (grid, copy))
    assert len(with_file) == 6
    assert all(row in without for row in with_file)


def test_without_its_runs_costs_are_not_known(grid: Path, tmp_path: Path) -> None:
    shutil.copy(grid / "results.json", tmp_path)
    report = read(tmp_path / "results.json")
    assert not report.figures
    assert "the grid&#39;s runs are not there" in report.html()


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "[", '[{"variant": "a"}]', '[{"variant": "a", "seed": 0, "train": [1]}]'],
)
def test_results_of_another_version_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CheckpointError, match="no results, or those of another version"):
        read(tmp_path)


def test_data_are_not_named_for_grids(grid: Path) -> None:
    with pytest.raises(InputError, match="grids are not measured"):
        read(grid, data=["name=digits"])
