"""Recipes that are made in Python, and what their sections refuse."""

import re
from pathlib import Path
from typing import Any

import pytest
import runs

from treeify.errors import RecipeError
from treeify.training.optimization_recipe import OptimizerRecipe
from treeify.training.recipe import LossRecipe, ModelRecipe, Ramp, Recipe, longer


def test_a_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="alhpa"):
        Recipe.model_validate(
            {
                "name": "x",
                "model": {"name": "resnet18"},
                "data": {"name": "digits"},
                "loss": {"name": "co_distillation", "alhpa": 1.0},
                "schedule": {"epochs": 1},
            }
        )


def test_a_ramp_moves_in_a_straight_line_and_then_stays() -> None:
    ramp = Ramp(start=1.0, stop=2.0, epochs=4.0)
    assert [ramp.at(epoch) for epoch in (0, 1, 4, 9)] == [1.0, 1.25, 2.0, 2.0]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            ModelRecipe,
            {"name": "resnet18", "pretrained": True, "init": "fresh"},
            "init: perturb (or copy)",
        ),
        (OptimizerRecipe, {"name": "momentun"}, "should name an optimizer, e.g. 'momentum'"),
        (OptimizerRecipe, {"name": "adahessian"}, "no second derivatives"),
        (
            LossRecipe,
            {
                "name": "co_distillation",
                "ramps": {"alpha": {"start": 0.0, "stop": 2.0, "epochs": 1.0}},
            },
            "less than or equal to 1 at both ends of the ramp of alpha",
        ),
    ],
)
def test_values_that_do_not_fit_one_another(
    section: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        section.model_validate(values)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e300",
        "optimizer.lr=0",
        "optimizer.weight_decay=1e300",
        "optimizer.level_rates=[1.0, 1e300]",
        "schedule.warmup_lr=1e300",
        "schedule.min_lr=1e300",
        "schedule.epochs=100000000000",
        "threads=1000000",
        "threads=0",
        "workers=1000000",
        "batch_size=100000000000000000000",
        "gradient_accumulation=100000000000000000000",
        "checkpoints.keep=100000000000000000000",
    ],
)
def test_slips_of_the_finger_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        runs.recipe(tmp_path, override)


@pytest.mark.parametrize(
    ("epochs", "reason"),
    [(-1, "no integer in range"), (-5, "no integer in range"), (10**12, "cannot have")],
)
def test_a_run_cannot_be_made_longer_by_any_number(
    tmp_path: Path, epochs: int, reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        longer(runs.recipe(tmp_path), epochs)
