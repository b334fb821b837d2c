"""What was measured of an ensemble, one value that is saved beside the weights."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter

from treeify.anytime.confidence import Budget
from treeify.anytime.deadline import Latencies
from treeify.engine.plan import AUTO, Tuning


@dataclass(frozen=True)
class Measurements:
    """How an ensemble runs fastest, how long that takes, and when an image may stop.

    Args:
        execution: the setting of `hne.execution`.
        tunings: what `hne.tune` chose, one for each situation.
        latencies: what `hne.calibrate` measured, one for each situation.
        budgets: confidence thresholds, one for each mean of MACs per image.
    """

    execution: str | tuple[str, ...] = AUTO
    tunings: tuple[Tuning, ...] = ()
    latencies: tuple[Latencies, ...] = ()
    budgets: tuple[Budget, ...] = ()


# To and from JSON values.
MEASUREMENTS = TypeAdapter(Measurements)
