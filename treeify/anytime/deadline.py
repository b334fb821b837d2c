"""Answers by a deadline: latencies measured beforehand, and the clock checked between steps.

At small batches a call costs much the same however few leaves it computes, so going straight to a
size is far cheaper than by the sizes before it. Latencies are therefore those of every transition.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from treeify.anytime.session import Answer, Session
from treeify.engine.plan import PLAN, SITUATION, Plan, Situation
from treeify.errors import InputError

# From how many leaves to how many.
Transition = tuple[int, int]

# Of 100 measurements of a transition, 99 were as fast as its slow latency or faster, and of 100
# forecasts of it 99 hold where only just enough time is left.
_MOST = 99
# Rounds that are measured whatever they take.
_LEAST = 5


@dataclass(frozen=True)
class Latencies:
    """How long every transition between sizes took on this machine.

    Args:
        situation: the input's shape and the machine.
        plan: how the ensemble ran.
        sizes: the nested sizes.
        typical: median seconds to go from `a` leaves straight to `b`, by `(a, b)`: from 0 to every
            size, and from every size to the next.
        slow: likewise the 99th percentile of the seconds.
        margins: what a forecast of each is multiplied by to hold 99 times in 100.
        repeats: how many rounds were measured, each with all transitions.

    Raises:
        ValueError: a transition is missing.
    """

    situation: Situation
    plan: Plan
    sizes: tuple[int, ...]
    typical: Mapping[Transition, float]
    slow: Mapping[Transition, float]
    margins: Mapping[Transition, float]
    repeats: int

    def __post_init__(self) -> None:
        """Check that there is a latency for every decision."""
        wanted = set(transitions(self.sizes))
        for known in (self.typical, self.slow, self.margins):
            if missing := wanted - known.keys():
                raise ValueError(f"no latencies for {sorted(missing)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "situation": SITUATION.dump_python(self.situation, mode="json"),
            "plan": PLAN.dump_python(self.plan, mode="json", by_alias=True),
            "sizes": list(self.sizes),
            "transitions": [
                {
                    "from": start,
                    "to": stop,
                    "typical": self.typical[start, stop],
                    "slow": self.slow[start, stop],
                    "margin": self.margins[start, stop],
                }
                for start, stop in transitions(self.sizes)
            ],
            "repeats": self.repeats,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Latencies:
        """What `to_dict` wrote."""
        rows = {(row["from"], row["to"]): row for row in values["transitions"]}
        return cls(
            SITUATION.validate_python(values["situation"]),
            PLAN.validate_python(values["plan"]),
            sizes=tuple(values["sizes"]),
            typical={key: row["typical"] for key, row in rows.items()},
            slow={key: row["slow"] for key, row in rows.items()},
            margins={key: row["margin"] for key, row in rows.items()},
            repeats=values["repeats"],
        )

    def caution(self) -> str:
        """By how much forecasts are stretched, in words."""
        return f"margins {min(self.margins.values()):.2f} to {max(self.margins.values()):.2f}"

    def rows(self) -> list[list[str]]:
        """A table: milliseconds from no leaf straight to each size, and from each to the next."""
        rows = [["from", *(f"to {size}" for size in self.sizes)]]
        for start in (0, *self.sizes[:-1]):
            times = [
                f"{1e3 * self.typical[start, stop]:.2f} ({1e3 * self.slow[start, stop]:.2f})"
                if (start, stop) in self.typical
                else ""
                for stop in self.sizes
            ]
            rows.append([str(start), *times])
        return rows

    def __str__(self) -> str:
        """The situation, and a table of milliseconds."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            [
                f"{self.situation}: {self.plan} ({self.repeats} rounds, {self.caution()})",
                "leaves; ms, and the 99th percentile",
                *(
                    "  ".join(
                        cell.rjust(width) for cell, width in zip(row, widths, strict=True)
                    ).rstrip()
                    for row in rows
                ),
            ]
        )


def transitions(sizes: Sequence[int]) -> list[Transition]:
    """From no leaf straight to every size, and from every size to the next.

    Not from every size to all larger ones: each takes a set of prepared weights of its own, and
    those of all together would drive one another out (`treeify.fusion.prepared_weights`).
    """
    return [*((0, size) for size in sizes), *pairwise(sizes)]


@dataclass
class Pace:
    """How slow the machine is at present: recent times over the typical ones.

    On a machine with other work slow steps come in a row, and so they do in sessions one after the
    other. The median of the last three tells such a spell from a single slow step.

    Args:
        recent: the ratios of the last steps of any session, at most three.
    """

    recent: tuple[float, ...] = ()


@dataclass
class Forecast:
    """How long a session's next step is likely to take, by what was seen so far.

    Args:
        typical: median seconds of every transition.
        pace: of the sessions before; it also learns from this one.
        spent: seconds that this session's steps took.
        expected: seconds that they typically take.
    """

    typical: Mapping[Transition, float]
    pace: Pace
    spent: float = 0.0
    expected: float = 0.0

    def seconds(self, transition: Transition) -> float:
        """The typical time, at the pace of late or of this session if that is slower."""
        ratio = median(self.pace.recent) if self.pace.recent else 1.0
        if self.expected:
            ratio = max(ratio, self.spent / self.expected)
        return self.typical[transition] * ratio

    def take(self, transition: Transition, seconds: float) -> None:
        """Learn from a step."""
        if typical := self.typical[transition]:
            self.pace.recent = (*self.pace.recent, seconds / typical)[-3:]
        self.spent += seconds
        self.expected += typical


def measure(
    start: Callable[[], Session],
    situation: Situation,
    plan: Plan,
    sizes: tuple[int, ...],
    *,
    repeats: int,
    budget: float,
) -> Latencies:
    """Time every transition between sizes in rounds, each in an order of its own.

    Args:
        start: begins a session.
        situation: what the sessions run on.
        plan: how they run.
        sizes: the nested sizes.
        repeats: how many rounds, after one to warm up.
        budget: seconds; after it no round begins, once five are measured.

    Raises:
        InputError: fewer than two rounds give no spread.
    """
    if repeats < 2:
        raise InputError(f"repeats={repeats} shows no spread.", expected="at least 2")
    order = random.Random(0)
    walks: list[list[tuple[Transition, float]]] = []
    begin = time.perf_counter()
    done = 0
    for count in range(repeats + 1):
        if count > _LEAST and time.perf_counter() - begin > budget:
            break
        for path in _paths(sizes, order):
            session, times = start(), []
            for transition in path:
                before = time.perf_counter()
                session.advance(to=transition[1])
                times.append((transition, time.perf_counter() - before))
            if count:
                walks.append(times)
        done = count
    columns: dict[Transition, list[float]] = {key: [] for key in transitions(sizes)}
    for key, seconds in (step for walk in walks for step in walk):
        columns[key].append(seconds)
    typical = {key: median(column) for key, column in columns.items()}
    slow = {key: _percentile(column, _MOST) for key, column in columns.items()}
    misjudged = _misjudged(walks, typical)
    margins = {key: _percentile(column, _MOST) for key, column in misjudged.items()}
    return Latencies(situation, plan, sizes, typical, slow, margins, done)


def _paths(sizes: Sequence[int], order: random.Random) -> Iterator[list[Transition]]:
    """Sessions that make every transition at least once, in random order."""
    left = transitions(sizes)
    order.shuffle(left)
    while left:
        start, stop = left[0]
        path = [(0, start)] if start else []
        while True:
            path.append((start, stop))
            left = [own for own in left if own not in path]
            following = [own for own in left if own[0] == stop]
            if not following:
                break
            start, stop = following[0]
        yield path


def _misjudged(
    walks: Sequence[Sequence[tuple[Transition, float]]], typical: Mapping[Transition, float]
) -> dict[Transition, list[float]]:
    """What each step took over what would have been forecast before it, by transition."""
    pace = Pace()
    found: dict[Transition, list[float]] = {key: [] for key in typical}
    for walk in walks:
        forecast = Forecast(typical, pace)
        for transition, seconds in walk:
            likely = forecast.seconds(transition)
            found[transition].append(seconds / likely if likely else 1.0)
            forecast.take(transition, seconds)
    return found


def _percentile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def advance_until(
    session: Session,
    latencies: Latencies,
    deadline: float,
    begin: float,
    *,
    pace: Pace | None = None,
    watch: Callable[[Answer], None] = lambda step: None,
) -> None:
    """Go straight to the largest size forecast to end in time, then on while the next one fits.

    A session without leaves always takes the first leaf. A forecast is the transition's typical
    time, times the pace of recent steps or of this session if that is slower, times the
    transition's margin. What is then left of the time decides again.

    Args:
        session: of the latencies' situation, at 0 leaves or a nested size.
        latencies: measured beforehand.
        deadline: seconds after `begin`.
        begin: when the clock started, in seconds of `time.perf_counter()`.
        pace: of the sessions before; it also learns from this one.
        watch: told every step; its time counts.
    """
    forecast = Forecast(latencies.typical, Pace() if pace is None else pace)
    while larger := [known for known in latencies.typical if known[0] == session.leaves]:
        now = time.perf_counter()
        left = deadline - (now - begin)
        fitting = [
            transition
            for transition in larger
            if forecast.seconds(transition) * latencies.margins[transition] <= left
        ]
        if not fitting and session.leaves:
            break
        transition = max(fitting) if fitting else min(larger)
        step = session.advance(to=transition[1])
        forecast.take(transition, time.perf_counter() - now)
        watch(step)


def check_deadline(deadline: float) -> None:
    """Raise InputError unless a deadline is a positive number of seconds."""
    if not deadline > 0:
        raise InputError(
            f"deadline={deadline!r} has passed before it began.", expected="seconds above 0"
        )


def find(known: Mapping[Situation, Latencies], situation: Situation, plan: Plan) -> Latencies:
    """The latencies measured for a situation.

    Raises:
        InputError: there are none, or they were measured for another machine, shape or plan.
    """
    found = known.get(situation)
    if found is not None and found.plan == plan:
        return found
    measured = "; ".join(
        f"{other}, {other.machine}, {latencies.plan}" for other, latencies in known.items()
    )
    raise InputError(
        "no latencies are known for this input on this machine.",
        expected=f"{situation}, {situation.machine}, {plan}",
        found=measured or "none, the ensemble has not been calibrated",
        next_step="Measure them with hne.calibrate(x), or treeify calibrate DIR on files.",
    )
