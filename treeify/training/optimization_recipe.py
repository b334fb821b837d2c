"""How weights are changed and averaged: sections `optimizer`, `schedule` and `ema` of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from timm.optim import get_optimizer_info, list_optimizers

from treeify.errors import nearest
from treeify.training.sections import Count, Rate, Section

if TYPE_CHECKING:
    from typing_extensions import Self


class OptimizerRecipe(Section):
    """One of timm's optimizers; the defaults are the paper's for CIFAR (appendix A).

    Args:
        name: as `timm.optim.list_optimizers()` has them: `momentum` is plain SGD with momentum,
            `sgd` the same with Nesterov's.
        lr: learning rate.
        momentum: of optimizers that have one.
        weight_decay: of all parameters but those that the model exempts; or see
            `filter_bias_and_bn`.
        filter_bias_and_bn: no weight decay for biases and norms, as timm does by default.
        layer_decay: factor of the learning rate from layer to layer, towards the input; of models
            that group their layers, as timm's do.
        level_rates: factors of the learning rate, one for each level of the tree from the input on,
            e.g. `[0.1, 0.3, 1.0]` for two splits; with `layer_decay` both count.
        options: further arguments of the optimizer, e.g. `{betas: [0.9, 0.95]}`.
        clip_grad: largest gradient.
        clip_mode: what is limited: the `norm` of all gradients, each `value`, or with `agc` the
            ratio of gradient to weight.
    """

    name: str = "momentum"
    lr: Annotated[Rate, Field(gt=0)] = 0.1
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: Rate = 5e-4
    filter_bias_and_bn: bool = False
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    level_rates: list[Annotated[Rate, Field(gt=0)]] | None = None
    options: dict[str, JsonValue] = Field(default={})
    clip_grad: PositiveFloat | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    @field_validator("name")
    @classmethod
    def _is_timms(cls, name: str) -> str:
        names = [str(optimizer) for optimizer in list_optimizers()]
        if name not in names:
            close = nearest(name, names) or ", ".join(names[:8])
            raise PydanticCustomError(
                "unknown_name", f"Input should name an optimizer, e.g. {close}"
            )
        if get_optimizer_info(name).second_order:
            raise PydanticCustomError(
                "second_order", "Input should need no second derivatives, which are not computed"
            )
        return name


class ScheduleRecipe(Section):
    """One of timm's learning-rate schedules, one step at a time.

    Args:
        name: cosine, tanh, step, multistep, poly, wsd, rsqrt or constant; not plateau, of which
            timm does not keep what it needs to be resumed.
        epochs: of the whole run.
        warmup_epochs: from `warmup_lr` to the full rate in a straight line. The schedule goes on as
            if it had begun with it; with `options: {warmup_prefix: true}` it begins after it, and
            takes the epochs that are left.
        warmup_lr: at the first step of a warm-up.
        min_lr: at the end.
        extended: after how many epochs `--more-epochs` made the run longer. Until then rates were
            those of a run of so many epochs; afterwards they are those of the longer one.
        options: further arguments of `timm.scheduler.create_scheduler_v2`, e.g. `{decay_rate: 0.1,
            decay_milestones: [100, 150]}`.
    """

    name: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = (
        "cosine"
    )
    epochs: Count
    warmup_epochs: NonNegativeFloat = 0.0
    warmup_lr: Rate = 1e-5
    min_lr: Rate = 0.0
    extended: list[Count] = Field(default=[])
    options: dict[str, JsonValue] = Field(default={})

    @model_validator(mode="after")
    def _epochs_are_in_order(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise PydanticCustomError("warmup", "Input should have fewer warmup_epochs than epochs")
        ends = [*self.extended, self.epochs]
        if ends != sorted(set(ends)):
            raise PydanticCustomError(
                "extended", "Input should have increasing numbers in extended, below epochs"
            )
        return self


class EmaRecipe(Section):
    """An exponential moving average of the weights, timm's `ModelEmaV3`; it is what is measured.

    Args:
        decay: of the average, per step.
        warmup: let the decay grow from 0, for short runs.
    """

    decay: float = Field(default=0.9999, gt=0, lt=1)
    warmup: bool = False

    def outlasts(self, steps: int) -> str | None:
        """Says so where more than a tenth of the average is still the initial weights in the end.

        Args:
            steps: of the whole run.
        """
        remaining = self.decay**steps
        if self.warmup or remaining < 0.1:
            return None
        return (
            f"ema.decay={self.decay:g} averages over more steps than the run's {steps:,}:"
            f" {100 * remaining:.1f} % of the average, which is what is measured, are the initial"
            f" weights in the end. Set ema.warmup=true, or ema.decay={0.01 ** (1 / steps):.3g}."
        )
