"""What a run directory holds, replaces and refuses."""

import json
from pathlib import Path

import pytest
import runs
import torch
import yaml
from torch.testing import assert_close

import treeify
from treeify.errors import CheckpointError, RecipeError
from treeify.evaluation.metrics import measure
from treeify.training import state_file, trainer
from treeify.training.events import Epoch, RunSize, Step
from treeify.training.loaders import held_out_loader
from treeify.training.optimization_recipe import ScheduleRecipe
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


def test_a_run_leaves_everything_behind(recipe: Recipe) -> None:
    recorder = runs.Recorder()
    result = train(recipe, reporter=recorder)
    directory = Path("runs/tiny")
    assert result.run.directory == directory
    assert not result.interrupted
    assert sorted(path.name for path in directory.iterdir()) == [
        "best",
        "checkpoints",
        "environment.json",
        "last",
        "metrics.jsonl",
        "recipe.yaml",
    ]
    assert load_recipe(directory / "recipe.yaml") == recipe
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["device"] == str(result.run.device)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [
        (1, runs.TINY_STEPS),
        (2, 2 * runs.TINY_STEPS),
    ]
    assert [score["leaves"] for score in lines[-1]["held_out"]] == [1, 2, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    run, *events = recorder.events
    assert isinstance(run, RunSize)
    kinds = [type(event) for event in events]
    assert kinds == 2 * [*runs.TINY_STEPS * [Step], Epoch]
    assert recorder.of(Epoch)[-1] == result.last
    assert [step.step for step in recorder.of(Step)] == 2 * [1, 2, 3]


def test_checkpoints_load_and_score_as_recorded(recipe: Recipe) -> None:
    result = train(recipe)
    batches = list(held_out_loader(recipe.data.load().held_out, 2000))
    loaded = treeify.load(result.run.directory / "last")
    for score, expected in zip(
        measure(loaded, batches).result(), result.last.held_out, strict=True
    ):
        assert (score.leaves, score.accuracy) == (expected.leaves, expected.accuracy)
    images = batches[0][0][:5]
    assert_close(loaded(images), result.run.hne.eval()(images))


def test_best_is_the_epoch_with_the_highest_accuracy(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = trainer.measure
    fractions = iter([0.5, 0.2])

    def falling(*args, **kwargs):
        scores = measured(*args, **kwargs)
        scores.state_dict()["correct"][-1] = scores.images * next(fractions)
        return scores

    monkeypatch.setattr(trainer, "measure", falling)
    directory = train(recipe).run.directory
    states = [state_file.read_state(directory / name) for name in ("best", "last")]
    assert [state["epochs"] for state in states] == [1, 2]


def test_run_directories_are_numbered(recipe: Recipe) -> None:
    short = recipe.model_copy(update={"schedule": ScheduleRecipe(epochs=1)})
    names = [train(short).run.directory for _ in range(3)]
    assert names == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]


def test_overwrite_replaces_the_run_and_nothing_else(recipe: Recipe) -> None:
    out = Path("mine")
    out.mkdir()
    (out / "recipe.yaml").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no run"):
        train(recipe, out=out, overwrite=True)
    assert (out / "recipe.yaml").read_text() == "mine"
    (out / "recipe.yaml").unlink()
    train(recipe, out=out)
    (out / "notes.txt").write_text("keep me")
    (out / "metrics.jsonl").write_text("old\n")
    with pytest.raises(CheckpointError):
        train(recipe, out=out)
    wrong = recipe.optimizer.model_copy(update={"options": {"no_such": 1}})
    with pytest.raises(RecipeError):
        train(recipe.model_copy(update={"optimizer": wrong}), out=out, overwrite=True)
    assert (out / "metrics.jsonl").read_text() == "old\n"
    train(recipe, out=out, overwrite=True)
    assert (out / "notes.txt").read_text() == "keep me"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_resolved_recipe_states_every_option(recipe: Recipe) -> None:
    short = recipe.model_copy(update={"schedule": ScheduleRecipe(epochs=1)})
    written = yaml.safe_load((train(short).run.directory / "recipe.yaml").read_text())
    assert written["loss"] == {
        "name": "hierarchical_distillation",
        "alpha": 0.5,
        "temperature": 2.0,
        "scale_by_t2": False,
        "ramps": {},
    }
    assert written["data"]["split_seed"] == 0
