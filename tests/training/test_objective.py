"""Losses, labels and teachers that a recipe names."""

from pathlib import Path

import pytest
import runs
import torch
import yaml

import treeify
from treeify.errors import RecipeError
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


def test_smoothed_labels_alone(recipe_file: Path) -> None:
    plain = train(load_recipe(recipe_file), out="plain").last
    smooth = train(load_recipe(recipe_file, ["mix={label_smoothing: 0.2}"]), out="smooth").last
    assert plain is not None and smooth is not None
    assert smooth.loss > plain.loss


def test_losses_of_ones_own_and_ramps(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(recipe_file.parent)
    (recipe_file.parent / "own_losses.py").write_text(
        "from torch.nn import functional as F\n\n"
        "seen = []\n\n\n"
        "class Weighted:\n"
        "    def __init__(self, *, weight: float = 1.0):\n"
        "        self.weight = weight\n\n"
        "    def __call__(self, logits, target, tree):\n"
        "        seen.append(self.weight)\n"
        "        return self.weight * F.cross_entropy(logits.mean(1), target)\n"
    )
    ramp = "loss.ramps={weight: {start: 1.0, stop: 2.0, epochs: 1}}"
    recipe = load_recipe(recipe_file, ["loss.name=own_losses:Weighted", ramp])
    train(recipe)
    import own_losses

    assert own_losses.seen == pytest.approx([1, 4 / 3, 5 / 3, 2, 2, 2])
    for override, match in (
        ("loss.ramps={wait: {start: 1.0, stop: 2.0, epochs: 1}}", "not of 'wait'"),
        ("loss.name=own_losses:Missing", "cannot be imported"),
        ("loss.wait=1.0", "did you mean 'weight'"),
    ):
        with pytest.raises(RecipeError, match=match):
            load_recipe(recipe_file, ["loss.name=own_losses:Weighted", override])


def test_an_ensemble_can_be_the_teacher(recipe: Recipe, recipe_file: Path) -> None:
    train(recipe, out="old")
    plain = train(recipe, out="plain").last
    taught = train(load_recipe(recipe_file, ["teacher={name: old, weight: 3.0}"]), out="taught")
    assert plain is not None and taught.last is not None
    assert taught.last.loss > plain.loss
    assert not torch.equal(
        runs.weights(Path("plain"))["head.weight"], runs.weights(Path("taught"))["head.weight"]
    )
    # A run is resumed from other directories than it began in.
    assert yaml.safe_load(Path("taught/recipe.yaml").read_text())["teacher"]["name"] == str(
        Path("old").absolute()
    )
    with pytest.raises(treeify.errors.ModelError):
        train(load_recipe(recipe_file, ["teacher={name: no_such_model}"]), out="third")
