"""Grids: bands over seeds, from the runs or from the file of their results alone."""

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import runs
import torch

import treeify
from treeify.errors import CheckpointError, InputError
from treeify.models.architecture import Architecture
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


def test_base_models_that_differ_are_left_out(grid: Path, tmp_path: Path) -> None:
    assert read(grid).contents.grids[0].base is not None
    copy = tmp_path / "out"
    shutil.copytree(grid, copy, symlinks=True)
    other = treeify.hierarchicalize(
        Architecture("treeify.models:cifar_resnet50", {"num_classes": 10, "width": 0.5}),
        ["block3", "block4"],
        init="fresh",
        example_input=torch.zeros(1, 3, 8, 8),
    )
    for last in copy.glob("L_HD/seed*/last"):
        last.unlink()
        treeify.save(other, last)
    found = read(copy)
    assert found.contents.grids[0].base is None
    assert "different base models" in " ".join(found.sections[0].missing)
    (chart,) = (chart for chart in found.charts if chart.name == "trade_off")
    assert "base model" not in {row[0] for row in chart.table.rows}


def test_it_is_said_which_variant_s_costs_are_not_known(grid: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(grid, copy, symlinks=True)
    shutil.rmtree(copy / "L_I")
    for config in copy.glob("L_HD/seed*/checkpoints/*/config.json"):
        config.write_text("{")
    missing = read(copy).contents.grids[0].missing
    assert missing["sizes of L_I"] == "What L_I costs is not known: no run of it is there."
    assert missing["sizes of L_HD"].startswith("What L_HD costs is not known: ")
    assert "config.json" in missing["sizes of L_HD"]


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "environment.json", "metrics.jsonl", "", "../../results.json"]
)
def test_links_that_lead_out_of_a_grid_are_not_followed(
    grid: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(grid, copy, symlinks=True)
    run = copy / "L_I" / "seed0"
    if name:
        (run / name).unlink()
    else:
        shutil.rmtree(run)
    (run / name).resolve().symlink_to((grid / "L_I" / "seed0" / name).resolve())
    with pytest.raises(CheckpointError, match="leads out of"):
        read(copy)
    assert len(read(copy, trust=True).contents.grids[0].variants) == 2


def test_data_are_not_named_for_grids(grid: Path) -> None:
    with pytest.raises(InputError, match="grids are not measured"):
        read(grid, data=["name=digits"])
