"""timm's optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from treeify.errors import RecipeError
from treeify.training.recipe import OptimizerRecipe, ScheduleRecipe


def optimizer(rule: OptimizerRecipe, model: nn.Module) -> torch.optim.Optimizer:
    """Build an optimizer of all of a model's parameters."""
    create: Callable[..., torch.optim.Optimizer] = create_optimizer_v2
    with _checked(f"optimizer {rule.name!r}", "optim.create_optimizer_v2"):
        return create(
            model,
            rule.name,
            lr=rule.lr,
            weight_decay=rule.weight_decay,
            momentum=rule.momentum,
            filter_bias_and_bn=rule.filter_bias_and_bn,
            layer_decay=rule.layer_decay,
            **rule.options,
        )


def scheduler(
    schedule: ScheduleRecipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """Build a scheduler, to be updated in every step; rates depend on the step's number alone."""
    create: Callable[..., Any] = create_scheduler_v2
    # With this option timm does not count the warm-up's epochs, which are part of the run.
    prefix = schedule.warmup_epochs if schedule.options.get("warmup_prefix") else 0
    with _checked(f"schedule {schedule.name!r}", "scheduler.create_scheduler_v2"):
        scheduler, _ = create(
            optimizer,
            schedule.name,
            num_epochs=schedule.epochs - prefix,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **schedule.options,
        )
    return scheduler


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
