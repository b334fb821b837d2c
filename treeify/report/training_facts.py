"""What a run's directory says of its training: epochs, rates, recipe and environment."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import torch

from treeify import files
from treeify.errors import CheckpointError, RecipeError
from treeify.report.results import Result
from treeify.training.environment import Environment
from treeify.training.events import Epoch
from treeify.training.optimizers import scheduler
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import METRICS, RunDirectory
from treeify.training.yaml_values import MOST_BYTES


def with_training(result: Result, recipe_file: Path) -> Result:
    """The same with what the run wrote down beside its checkpoints.

    Args:
        result: of one of its checkpoints.
        recipe_file: of the run, in its directory.
    """
    directory = RunDirectory(recipe_file.parent)
    missing = dict(result.missing)
    epochs = tuple(directory.metrics())
    if not epochs:
        missing["training"] = f"{directory.path / METRICS} holds no epoch that can be read."
    rates: tuple[float, ...] = ()
    origin = {**result.origin}
    try:
        recipe = load_recipe(recipe_file)
    except RecipeError as error:
        missing["rates"] = str(error).splitlines()[0]
    else:
        rates = rates_of(recipe, epochs)
        origin |= _of_recipe(recipe)
    try:
        origin |= _of_environment(directory.environment())
    except CheckpointError as error:
        missing["environment"] = str(error).splitlines()[0]
    text = files.read_bytes(recipe_file, MOST_BYTES).decode(errors="replace")
    return replace(result, epochs=epochs, rates=rates, origin=origin, recipe=text, missing=missing)


def rates_of(recipe: Recipe, epochs: tuple[Epoch, ...]) -> tuple[float, ...]:
    """The learning rate of the last step of every epoch, as the recipe schedules it."""
    if not epochs:
        return ()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.optimizer.lr)
    per_epoch = max(1, round(epochs[-1].step / epochs[-1].epoch))
    schedule = scheduler(recipe.schedule, optimizer, per_epoch)
    rates = []
    for epoch in epochs:
        schedule.step_update(max(0, epoch.step - 1))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return tuple(rates)


def _of_recipe(recipe: Recipe) -> dict[str, str]:
    return {
        "recipe": recipe.name,
        "data": recipe.data.name,
        "loss": recipe.loss.name,
        "seed": str(recipe.seed),
    }


def _of_environment(environment: Environment) -> dict[str, str]:
    versions = {"Python": environment.python, **environment.versions}
    commit = {} if environment.commit is None else {"commit": environment.commit}
    device = environment.gpu or f"{environment.device}, {environment.threads} threads"
    return {
        "command": shlex.join(["treeify", *environment.argv[1:]]),
        "started": environment.started,
        "machine": f"{environment.platform}, {environment.cpus} cores, {device}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        **commit,
    }
