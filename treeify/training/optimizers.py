"""timm's optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.errors import RecipeError
from treeify.training.fine_tuning import frozen_at_random, level_names, level_of
from treeify.training.optimization_recipe import OptimizerRecipe, ScheduleRecipe
from treeify.training.recipe import Recipe


def optimizer(rule: OptimizerRecipe, hne: HierarchicalEnsemble) -> torch.optim.Optimizer:
    """Build an optimizer of an ensemble's parameters that require gradients.

    Raises:
        RecipeError: an option is unknown, the base model does not group its layers for a
            layer decay, or there is not one rate for each level.
    """
    if rule.layer_decay is not None and not hasattr(hne, "group_matcher"):
        raise RecipeError(
            f"optimizer.layer_decay: {type(hne.skeleton).__name__} does not say how its parameters"
            " group into layers.",
            expected="a model with a method group_matcher, as timm's have",
            next_step="Set optimizer.level_rates, which needs none, or leave layer_decay out.",
        )
    create: Callable[..., torch.optim.Optimizer] = create_optimizer_v2
    with _checked(f"optimizer {rule.name!r}", "optim.create_optimizer_v2"):
        optimizer = create(
            hne,
            rule.name,
            lr=rule.lr,
            weight_decay=rule.weight_decay,
            momentum=rule.momentum,
            filter_bias_and_bn=rule.filter_bias_and_bn,
            layer_decay=rule.layer_decay,
            **rule.options,
        )
    if rule.level_rates is not None:
        _scale_levels(optimizer, hne, rule.level_rates)
    return optimizer


def _scale_levels(
    optimizer: torch.optim.Optimizer, hne: HierarchicalEnsemble, rates: Sequence[float]
) -> None:
    """Divide an optimizer's groups by level; their factors are timm's `lr_scale`."""
    if len(rates) != hne.tree.levels:
        raise RecipeError(
            "optimizer.level_rates does not fit the tree.",
            expected=f"{hne.tree.levels} factors: {', '.join(level_names(hne))}",
            found=f"{len(rates)}",
        )
    levels = {id(tensor): level_of(hne, name) for name, tensor in hne.named_parameters()}
    divided = []
    for group in optimizer.param_groups:
        for level, rate in enumerate(rates):
            if parameters := [p for p in group["params"] if levels[id(p)] == level]:
                scale = group.get("lr_scale", 1.0) * rate
                divided.append({**group, "params": parameters, "lr_scale": scale})
    optimizer.param_groups[:] = divided  # in place: a wrapper, as Lookahead, has the same list


def learning_rate(optimizer: Any) -> float:
    """The present learning rate, of parameters to which no factor applies."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group.get("lr_scale", 1.0))


class Phases:
    """The schedules of a run that was extended: each of a run as long as planned at the time.

    Args:
        phases: the steps after which each ends, and the schedule.
    """

    def __init__(self, phases: Sequence[tuple[int, Any]]) -> None:
        self.phases = phases
        self.step_update(0)

    def step_update(self, step: int) -> None:
        """Set the rates of a step, counted from 0."""
        ends = (schedule for end, schedule in self.phases if step < end)
        next(ends, self.phases[-1][1]).step_update(step)


def scheduler(
    schedule: ScheduleRecipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """Build a scheduler, to be updated in every step; rates depend on the step's number alone."""
    phases = [
        (epochs * steps_per_epoch, _schedule(schedule, epochs, optimizer, steps_per_epoch))
        for epochs in (*schedule.extended, schedule.epochs)
    ]
    return Phases(phases) if schedule.extended else phases[0][1]


def _schedule(
    schedule: ScheduleRecipe, epochs: int, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """The schedule of a run of so many epochs."""
    create: Callable[..., Any] = create_scheduler_v2
    # With this option timm does not count the warm-up's epochs, which are part of the run.
    prefix = schedule.warmup_epochs if schedule.options.get("warmup_prefix") else 0
    with _checked(f"schedule {schedule.name!r}", "scheduler.create_scheduler_v2"):
        scheduler, _ = create(
            optimizer,
            schedule.name,
            num_epochs=epochs - prefix,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **schedule.options,
        )
    return scheduler


def extension(schedule: ScheduleRecipe, optimizer: Any) -> str:
    """What became of the rates of a run that was made longer, for its user."""
    return (
        f"The run has {schedule.epochs} epochs now instead of {schedule.extended[-1]}. After those,"
        f" learning rates are of a {schedule.name} schedule of {schedule.epochs} epochs; the next"
        f" is {learning_rate(optimizer):.3g}. --resume alone goes on with it from now on."
    )


def doubts(recipe: Recipe, steps_per_epoch: int) -> Iterator[str]:
    """What a new run's recipe may not mean."""
    schedule = recipe.schedule
    if text := cliff(schedule, recipe.optimizer.lr, steps_per_epoch):
        yield text
    if recipe.ema and (text := recipe.ema.outlasts(schedule.epochs * steps_per_epoch)):
        yield text
    if text := frozen_at_random(recipe.model):
        yield text


def cliff(schedule: ScheduleRecipe, lr: float, steps_per_epoch: int) -> str | None:
    """Says so where the learning rate falls by more than a tenth as soon as it is warmed up."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    warm_up = math.ceil(schedule.warmup_epochs * steps_per_epoch)
    scheduler(schedule, optimizer, steps_per_epoch).step_update(warm_up)
    rate = optimizer.param_groups[0]["lr"]
    if not warm_up or rate > 0.9 * lr:
        return None
    return (
        f"The learning rate is warmed up to {lr:g}, and falls to {rate:.3g} at once: timm's"
        f" {schedule.name} schedule counts the epochs of the warm-up too. To begin it after them,"
        " set schedule.options.warmup_prefix=true."
    )


@contextmanager
def _checked(subject: str, function: str) -> Iterator[None]:
    """Turn what timm raises for options that it does not accept into a `RecipeError`."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise RecipeError(
            f"{subject} cannot be built: {error}",
            expected=f"options that timm.{function} accepts for it",
        ) from error


def in_memory_formats(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A saved optimizer's state in the memory formats of the parameters it belongs to.

    Files hold every tensor contiguously. Kernels go through memory in order, and in another order
    they may round differently: the resumed run would not get the bits of one that was not stopped.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[int(index)]
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return state
