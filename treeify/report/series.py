"""What figures draw: curves over the nested sizes, each value with its spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal, Protocol


@dataclass(frozen=True)
class Spread:
    """A value of one run, or the mean, least and largest of several seeds' runs."""

    mean: float
    low: float
    high: float
    seeds: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        return cls(mean(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Curve:
    """A value of every nested size over what the size costs.

    Args:
        name: of the run or the variant.
        leaves: the sizes, increasing.
        costs: of each size, MACs per image or milliseconds.
        values: of each size.
    """

    name: str
    leaves: tuple[int, ...]
    costs: tuple[float, ...]
    values: tuple[Spread, ...]

    @property
    def has_spread(self) -> bool:
        """Whether it is of several seeds."""
        return any(value.seeds > 1 for value in self.values)


@dataclass(frozen=True)
class BaseModel:
    """What the base model costs, in the curves' unit, and its accuracy in percent where known."""

    name: str
    cost: float
    accuracy: float | None = None


@dataclass(frozen=True)
class BudgetPoint:
    """Images that stop by confidence: mean cost per image, and accuracy in percent.

    They are drawn in the colour of the curve of that name.
    """

    curve: str
    cost: float
    accuracy: float


class PublishedSeries(Protocol):
    """Points that somebody printed, or that were read off a printed plot."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def source(self) -> str:
        """Where it stands."""

    @property
    def kind(self) -> Literal["printed", "digitised"]:
        """How exact it is."""

    @property
    def macs_are(self) -> str:
        """Who counted the MACs, and how."""

    @property
    def points(self) -> Sequence[tuple[float, float]]:
        """MACs per image and accuracy in percent."""
