"""What was measured of an ensemble, as one value: it is saved beside the weights, and read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

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
    latencies: tuple[
        Annotated[
            Latencies, PlainValidator(Latencies.from_dict), PlainSerializer(Latencies.to_dict)
        ],
        ...,
    ] = ()
    budgets: tuple[
        Annotated[Budget, PlainValidator(Budget.from_dict), PlainSerializer(Budget.to_dict)], ...
    ] = ()


# To and from JSON values.
MEASUREMENTS = TypeAdapter(Measurements)
