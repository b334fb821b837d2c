"""A run of seconds, calibrated, and the report of it."""

from pathlib import Path

import pytest
import runs
import torch

import treeify
from treeify.conversion.saving import save_measurements
from treeify.evaluation.halves import Halves
from treeify.models.architecture import Architecture
from treeify.report.api import Report, read
from treeify.training.loaders import held_out_loader
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, only to be read: 4 leaves, 2 epochs, latencies and budgets."""
    folder = tmp_path_factory.mktemp("report")
    recipe = load_recipe(runs.tiny(folder))
    train(recipe, out=folder / "tiny")
    last = folder / "tiny" / "last"
    hne = treeify.load(last)
    halves = Halves(hne, held_out_loader(recipe.data.load().held_out, 128), seed=0)
    least, most = hne.count_macs(1), hne.count_macs()
    point = halves.point((least + most) // 2)
    hne.budgets[point.chosen.target_macs] = point.reported
    hne.calibrate(hne.example_images(1), repeats=5)
    save_measurements(hne, last.resolve())
    return folder / "tiny"


@pytest.fixture(scope="session")
def report(run: Path) -> Report:
    return read(run)


@pytest.fixture(scope="session")
def html(report: Report) -> str:
    return report.html()


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble that nobody trained."""
    path = tmp_path_factory.mktemp("converted") / "fresh"
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Architecture("small:build", {"classes": 10}),
        ["stage1", "stage2"],
        init="fresh",
        example_input=torch.zeros(1, 3, 8, 8),
    )
    treeify.save(hne, path)
    return path
