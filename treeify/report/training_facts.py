"""What a run's directory says of its training: epochs, rates, recipe and environment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError

from treeify import files
from treeify.errors import CheckpointError, RecipeError
from treeify.report.results import Result
from treeify.training.environment import Environment
from treeify.training.events import Epoch
from treeify.training.optimization_recipe import OptimizerRecipe, ScheduleRecipe
from treeify.training.optimizers import scheduler
from treeify.training.recipe_file import values_of_run
from treeify.training.run_directory import ENVIRONMENT, METRICS, RunDirectory
from treeify.training.sections import Section
from treeify.training.yaml_values import MOST_BYTES


class _RatesOfRun(Section):
    """The part of a run's recipe that learning rates follow from; the rest is not looked at.

    Its other sections may name what would be imported to check them.
    """

    model_config = ConfigDict(extra="ignore")

    schedule: ScheduleRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()


def with_training(result: Result, recipe_file: Path, *, trust: bool = False) -> Result:
    """The same with what the run wrote down beside its checkpoints.

    Args:
        result: of one of its checkpoints.
        recipe_file: of the run, in its directory, which may be anybody's.
        trust: whether links may lead out of that.

    Raises:
        CheckpointError: one does.
    """
    directory = RunDirectory(recipe_file.parent)
    for name in () if trust else (METRICS, ENVIRONMENT):
        files.require_inside(directory.path / name, directory.path)
    missing, origin = dict(result.missing), dict(result.origin)
    epochs = tuple(directory.metrics())
    if not epochs:
        missing["training"] = f"{directory.path / METRICS} holds no epoch that can be read."
    rates: tuple[float, ...] = ()
    try:
        values = values_of_run(recipe_file)
        origin |= _of_recipe(values)
        rates = rates_of(_RatesOfRun.model_validate(values), epochs)
    except (RecipeError, ValidationError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        missing["rates"] = f"The learning rates do not follow from {recipe_file}: {reason}"
    try:
        origin |= _of_environment(directory.environment())
    except CheckpointError as error:
        missing["environment"] = str(error).splitlines()[0]
    text = files.read_bytes(recipe_file, MOST_BYTES).decode(errors="replace")
    return replace(result, epochs=epochs, rates=rates, origin=origin, recipe=text, missing=missing)


def rates_of(recipe: _RatesOfRun, epochs: tuple[Epoch, ...]) -> tuple[float, ...]:
    """The learning rate of the last step of every epoch, as the recipe schedules it.

    Raises:
        RecipeError: there is no such schedule.
    """
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


def _of_recipe(values: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe calls the run, its data and its loss, and its seed; nothing is checked."""
    facts = {"recipe": values.get("name"), "seed": values.get("seed")}
    for key in ("data", "loss"):
        section = values.get(key)
        facts[key] = section.get("name") if isinstance(section, dict) else None
    return {key: str(value) for key, value in facts.items() if value is not None}


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
