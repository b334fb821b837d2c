"""Real training runs, seconds long, on a sixth of the digits."""

import math
import shutil
from pathlib import Path

import pytest
import runs
import torch
from torch.testing import assert_close

import treeify
from treeify import losses
from treeify.errors import CheckpointError, DataError, RecipeError
from treeify.evaluation.metrics import measure
from treeify.training import state_file
from treeify.training.loaders import held_out_loader
from treeify.training.optimization_recipe import OptimizerRecipe, ScheduleRecipe
from treeify.training.recipe import LossRecipe, Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import DivergedError, train


def test_a_checkpoint_holds_the_trainers_state(recipe: Recipe) -> None:
    last = train(recipe).run.directory / "last"
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".json"}
    state = state_file.read_state(last)
    assert (state["epochs"], state["step"]) == (2, 2 * runs.TINY_STEPS)
    parameters = list(treeify.load(last).parameters())
    momenta = [buffers["momentum_buffer"] for buffers in state["optimizer"]["state"].values()]
    assert [tensor.shape for tensor in momenta] == [tensor.shape for tensor in parameters]


def test_the_same_seed_gives_the_same_weights(recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"flip": True})})
    first, second = (runs.weights(train(recipe).run.directory) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = runs.weights(train(recipe.model_copy(update={"seed": 1})).run.directory)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_loss_is_an_error_and_keeps_the_last_state(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    calls = []

    def exploding(logits, target, tree):
        calls.append(None)
        return logits.sum() * (value if len(calls) > runs.TINY_STEPS else 1e-3)

    monkeypatch.setitem(losses.LOSSES, "exploding", exploding)
    recipe = recipe.model_copy(update={"loss": LossRecipe(name="exploding")})
    with pytest.raises(DivergedError, match=f"(?s){value}.* in epoch 2, step 1.*last"):
        train(recipe)
    assert state_file.read_state(Path("runs/tiny/last"))["step"] == runs.TINY_STEPS
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(Path("runs/tiny")).values())


def test_channels_last_trains_to_the_same_weights(recipe: Recipe) -> None:
    """Up to rounding, which training amplifies: one epoch at a small rate."""
    gentle = {"schedule": ScheduleRecipe(epochs=1), "optimizer": OptimizerRecipe(lr=1e-3)}
    slow = recipe.model_copy(update=gentle)
    plain, last = (
        runs.weights(train(slow.model_copy(update={"channels_last": on})).run.directory)
        for on in (False, True)
    )
    for key, tensor in plain.items():
        assert_close(last[key], tensor, rtol=1e-2, atol=1e-3)


def test_threads_are_put_back(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    train(recipe.model_copy(update={"threads": 1, "schedule": ScheduleRecipe(epochs=1)}))
    assert counts == [2, 1, 2]


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("model.kwargs.num_classes=100", RecipeError, r"10 classes(?s:.)*one with 100"),
        ("data.held_out=3", DataError, "cannot be held out"),
        ("device=cuda:7", RecipeError, "cuda:7"),
        ("out=.", CheckpointError, "new or empty"),
        ("out=tiny.yaml", CheckpointError, "new or empty"),
    ],
)
def test_nothing_is_written_for_bad_input(
    recipe_file: Path, override: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train(load_recipe(recipe_file, [override]))
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_a_moving_average_is_measured_and_saved(recipe: Recipe, recipe_file: Path) -> None:
    result = train(load_recipe(recipe_file, ["ema={decay: 0.5}"]))
    directory = result.run.directory
    averaged = treeify.load(directory / "last" / "ema")
    batches = list(held_out_loader(recipe.data.load().held_out, 2000))
    assert result.last is not None
    accuracies = [score.accuracy for score in measure(averaged, batches).result()]
    assert accuracies == [score.accuracy for score in result.last.held_out]
    raw = treeify.load(directory / "last").state_dict()
    assert not torch.equal(raw["head.weight"], averaged.state_dict()["head.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_train(recipe_file: Path, precision: str) -> None:
    usual = train(load_recipe(recipe_file), out="usual").last
    result = train(load_recipe(recipe_file, [f"precision={precision}"]))
    assert usual is not None and result.last is not None
    assert result.last.loss != usual.loss
    assert result.last.loss == pytest.approx(usual.loss, rel=0.1 if precision == "bf16" else 1e-3)
    dtype = {"bf16": torch.float32, "fp64": torch.float64}[precision]
    assert runs.weights(result.run.directory)["head.weight"].dtype is dtype


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_same_but_for_rounding(recipe_file: Path) -> None:
    plain = train(load_recipe(recipe_file, [])).last
    result = train(load_recipe(recipe_file, ["compile=true"]))
    assert plain is not None and result.last is not None
    assert result.last.loss == pytest.approx(plain.loss, rel=1e-3)
    assert treeify.load(result.run.directory / "last").leaves == 4
