"""How fast ensembles and exports answer here: the first answer, all steps, one call, in turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.runtime import ENGINES, Anytime
from treeify.engine import timing

# Ways to answer; an export has no base model.
FIRST, STEPS, CALL, BASE = "first", "steps", "call", "base"
Actions = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Times:
    """How long something took.

    Args:
        median: seconds.
        quartiles: the first and the third.
        rounds: how often it was measured.
    """

    median: float
    quartiles: tuple[float, float]
    rounds: int

    def __str__(self) -> str:
        """Milliseconds, and half the distance between the quartiles."""
        low, high = self.quartiles
        return f"{1e3 * self.median:.2f} ±{500 * (high - low):.2f}"


def installed_engines() -> tuple[str, ...]:
    """The engines for exports that are there."""
    return tuple(name for name in ENGINES if find_spec(name) is not None)


def ensemble_actions(hne: HierarchicalEnsemble, x: Tensor, base: nn.Module) -> Actions:
    """Ways to answer images with an ensemble in evaluation mode, and with its base model."""
    return {
        BASE: partial(base, x),
        FIRST: lambda: hne.session(x).advance(),
        STEPS: lambda: list(hne.anytime(x)),
        CALL: partial(hne.predict, x),
    }


def export_actions(exported: ExportedEnsemble, engine: str, threads: int, x: Tensor) -> Actions:
    """The same of an export in an engine, whose files are all opened first."""
    model = Anytime(exported.path, threads=threads, engine=engine, preload="all")
    images = x.numpy()
    return {
        FIRST: lambda: model.session(images).advance(),
        STEPS: lambda: list(model.anytime(images)),
        CALL: partial(model.predict, images),
    }


@torch.no_grad()
def take_turns(
    subjects: Sequence[Actions], device: torch.device, *, repeats: int, budget: float
) -> list[dict[str, Times]]:
    """Measure all that several subjects do, in turns.

    Args:
        subjects: what is measured, all in one engine: two pools of threads slow each other.
        device: that has to be waited for.
        repeats: rounds at most.
        budget: seconds after which no more rounds begin.
    """
    actions = {
        f"{index} {name}": action
        for index, subject in enumerate(subjects)
        for name, action in subject.items()
    }
    times = timing.alternate(actions, device, repeats=repeats, budget=budget)
    return [
        {name: _times(times[f"{index} {name}"]) for name in subject}
        for index, subject in enumerate(subjects)
    ]


def _times(seconds: Sequence[float]) -> Times:
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return Times(middle, (low, high), len(seconds))
