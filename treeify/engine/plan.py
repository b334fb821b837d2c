"""Plans: how the levels of an ensemble run, set by the user or chosen by measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from treeify.engine import timing
from treeify.engine.program import EXECUTIONS, LOOPED, PACKED
from treeify.errors import InputError, described

AUTO = "auto"

# Why a tuning's plan may have taken longer than another one in the list.
NOT_THE_FASTEST = (
    "A plan gives way only to one that wins by 2 % (by 7 % after one or two rounds) when both are"
    " measured in turns; times that were not measured together compare less well"
)


@dataclass(frozen=True)
class Plan:
    """How inputs of one shape run.

    Args:
        execution: `packed` or `looped`, per level.
        channels_last: whether images, and so activations, have that memory format, `[N, H, W, C]`;
            None leaves images in their own.
        fuse: whether layers take in what follows them; only ever without gradients.
    """

    # Saved ensembles have it under this name.
    execution: Annotated[tuple[str, ...], Field(alias="ways")]
    channels_last: bool | None = None
    fuse: bool = False

    @property
    def memory_format(self) -> torch.memory_format | None:
        """Of images and parameters; None leaves them in their own."""
        if self.channels_last is None:
            return None
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def arrange(self, x: Tensor) -> Tensor:
        """The input in the plan's memory format."""
        if x.ndim != 4 or self.memory_format is None:
            return x
        return x.contiguous(memory_format=self.memory_format)

    def __str__(self) -> str:
        """One line, e.g. `packed packed looped, channels_last, fused`."""
        options = {"channels_last": self.channels_last, "fused": self.fuse}
        return ", ".join([" ".join(self.execution), *(name for name in options if options[name])])


@dataclass(frozen=True)
class Situation:
    """What a plan was chosen for: inputs of a shape `(N, C, H, W)` and dtype on a machine.

    `training` is a training step, forward and backward; otherwise it is inference.
    """

    training: bool
    shape: tuple[int, ...]
    dtype: str
    machine: str

    @classmethod
    def of(cls, x: Tensor, *, training: bool) -> Situation:
        """The situation of an input on this machine."""
        return cls(training, tuple(x.shape), str(x.dtype), timing.describe(x.device))

    def __str__(self) -> str:
        """One line."""
        mode = "training step" if self.training else "inference"
        size = "x".join(map(str, self.shape))
        return f"{mode}, {size} {self.dtype.removeprefix('torch.')}"


@dataclass(frozen=True)
class Tuning:
    """What was measured for one situation, and the plan it led to.

    Args:
        situation: the shape, mode and machine.
        plan: the fastest plan found.
        seconds: median time of every plan tried, by the plan as text.
    """

    situation: Situation
    plan: Plan
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """The choice and what it was chosen from, fastest first."""
        rows = sorted(self.seconds.items(), key=lambda row: row[1])
        lines = [f"{self.situation}: {self.plan}"]
        lines += [f"  {1000 * t:10.2f} ms  {name}" for name, t in rows]
        if rows and rows[0][0] != str(self.plan):
            lines.append(f"{NOT_THE_FASTEST}.")
        return "\n".join(lines)


# To and from JSON values.
TUNING = TypeAdapter(Tuning)


class Planner:
    """Chooses the plan of an input, by the user's setting and by what was tuned."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.setting: str | tuple[str, ...] = AUTO
        self.tunings: dict[Situation, Tuning] = {}

    def set(self, setting: str | Sequence[str]) -> None:
        """Choose how levels run.

        Args:
            setting: `packed`, `looped` or `auto` for all levels, or one of them for each.

        Raises:
            InputError: a word is unknown, or their number is not that of the levels.
        """
        execution: tuple[Any, ...] = ()
        if isinstance(setting, Sequence):
            execution = (setting,) * self.levels if isinstance(setting, str) else tuple(setting)
        if len(execution) != self.levels or any(
            level not in (AUTO, *EXECUTIONS) for level in execution
        ):
            raise InputError(
                f"execution={described(setting)} is no way to run.",
                expected=f"'{AUTO}', '{PACKED}' or '{LOOPED}', or one of them for each of the"
                f" {self.levels} levels",
                found=", ".join(map(described, execution[:8])) or described(setting),
                next_step="Choose 'auto' for what hne.tune measured.",
            )
        self.setting = setting if isinstance(setting, str) else execution

    def plan(self, x: Tensor, *, training: bool, tuned: bool = True) -> Plan:
        """How an input runs: the setting, with what was tuned for its shape or the nearest batch.

        What was tuned counts only if `tuned`.
        """
        tuning = self._nearest(x, training=training) if self.tunings and tuned else None
        plan = tuning.plan if tuning else Plan((PACKED,) * self.levels)
        setting = self.setting
        levels = (setting,) * self.levels if isinstance(setting, str) else setting
        execution = tuple(
            best if level == AUTO else level
            for level, best in zip(levels, plan.execution, strict=True)
        )
        return replace(plan, execution=execution)

    def _nearest(self, x: Tensor, *, training: bool) -> Tuning | None:
        """The tuning for an input, else that for the batch size whose ratio to it is the least."""
        now = Situation.of(x, training=training)
        if now in self.tunings:
            return self.tunings[now]
        alike = [
            tuning
            for other, tuning in self.tunings.items()
            if replace(other, shape=now.shape) == now and other.shape[1:] == now.shape[1:]
        ]
        batch = max(1, now.shape[0])
        return min(
            alike, key=lambda tuning: abs(log(tuning.situation.shape[0] / batch)), default=None
        )
