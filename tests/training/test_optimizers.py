"""timm's optimizers and schedules, by name and with their options."""

import math
from pathlib import Path

import pytest
import runs

from treeify.errors import RecipeError
from treeify.training import state_file
from treeify.training.events import Step
from treeify.training.optimization_recipe import OptimizerRecipe, ScheduleRecipe
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


def test_each_step_uses_its_own_learning_rate(recipe: Recipe) -> None:
    recorder = runs.Recorder()
    schedule = ScheduleRecipe(epochs=4, warmup_epochs=1, warmup_lr=0.01)
    train(recipe.model_copy(update={"schedule": schedule}), reporter=recorder)
    lrs = [step.lr for step in recorder.of(Step)]
    warming = [0.01 + 0.04 * step / runs.TINY_STEPS for step in range(runs.TINY_STEPS)]
    cosine = [
        0.025 * (1 + math.cos(math.pi * step / (4 * runs.TINY_STEPS)))
        for step in range(runs.TINY_STEPS, 4 * runs.TINY_STEPS)
    ]
    assert lrs == pytest.approx([*warming, *cosine])


def test_a_schedule_or_optimizer_of_timm_is_used_by_name(recipe: Recipe) -> None:
    recorder = runs.Recorder()
    schedule = ScheduleRecipe(
        name="multistep", epochs=3, options={"decay_milestones": [1, 2], "decay_rate": 0.1}
    )
    rule = OptimizerRecipe(
        name="lamb", lr=1e-3, options={"betas": [0.8, 0.9]}, filter_bias_and_bn=True, clip_grad=1.0
    )
    train(recipe.model_copy(update={"schedule": schedule, "optimizer": rule}), reporter=recorder)
    lrs = [step.lr for step in recorder.of(Step)][:: runs.TINY_STEPS]
    assert lrs == pytest.approx([1e-3, 1e-4, 1e-5])
    groups = state_file.read_state(Path("runs/tiny/last"))["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0, 5e-4]
    assert groups[0]["betas"] == [0.8, 0.9]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("optimizer.options={no_such: 1}", "optimizer 'momentum' cannot be built.*no_such"),
        ("schedule.options={no_such: 1}", "schedule 'cosine' cannot be built.*no_such"),
        ("trackers=[tensorbored]", "this run cannot be set up.*tensorbored"),
    ],
)
def test_options_timm_or_accelerate_does_not_know(
    recipe_file: Path, override: str, match: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){match}"):
        train(load_recipe(recipe_file, [override]))
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]
    with pytest.raises(RecipeError, match="no second derivatives"):
        load_recipe(recipe_file, ["optimizer.name=adahessian"])
