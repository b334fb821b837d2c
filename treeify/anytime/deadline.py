"""Answers by a deadline: latencies measured beforehand, and the clock read between answers.

At small batches a call costs much the same however few leaves it computes, so going straight to a
size is far cheaper than by the sizes before it. Latencies are therefore those of every transition.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from statistics import median, quantiles
from typing import Annotated

from pydantic import Field, TypeAdapter

from treeify.anytime.session import Answer, Session
from treeify.arguments import is_number, require_integer, require_number
from treeify.engine.plan import Plan, Situation
from treeify.errors import InputError, described

# From how many leaves to how many.
Transition = tuple[int, int]

# Deadlines are to be kept 99 times in 100: a margin is such that, where only just enough time is
# left, 99 of 100 forecasts hold. The median alone would miss every second one.
_PERCENT = 99
# Fewer rounds than these show no spread, so they are measured whatever they take.
_MIN_ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """How many seconds it takes to go from `start` leaves straight to `stop`.

    `typical` is the median and `slow` the 99th percentile; a forecast is multiplied by `margin` to
    hold 99 times in 100.
    """

    # Saved ensembles have the ends of a transition under these names.
    start: Annotated[int, Field(alias="from")]
    stop: Annotated[int, Field(alias="to")]
    typical: float
    slow: float
    margin: float


@dataclass(frozen=True)
class Latencies:
    """How long every transition between sizes took on this machine.

    Args:
        situation: the input's shape and the machine.
        plan: how the ensemble ran.
        sizes: the nested sizes.
        transitions: from 0 to every size, and from every size to the next.
        repeats: how many rounds were measured, each with all transitions.

    Raises:
        ValueError: a transition is missing.
    """

    situation: Situation
    plan: Plan
    sizes: tuple[int, ...]
    transitions: tuple[Latency, ...]
    repeats: int

    def __post_init__(self) -> None:
        """Check that there is a latency for every decision."""
        if missing := set(transitions(self.sizes)) - self.typical.keys():
            raise ValueError(f"no latencies for {sorted(missing)}")

    @cached_property
    def typical(self) -> dict[Transition, float]:
        """Median seconds of every transition, by its leaves before and afterwards."""
        return {(row.start, row.stop): row.typical for row in self.transitions}

    @cached_property
    def slow(self) -> dict[Transition, float]:
        """The 99th percentile of the seconds of every transition."""
        return {(row.start, row.stop): row.slow for row in self.transitions}

    @cached_property
    def margins(self) -> dict[Transition, float]:
        """What a forecast of each transition is multiplied by to hold 99 times in 100."""
        return {(row.start, row.stop): row.margin for row in self.transitions}

    def margin_range(self) -> str:
        """The smallest and the largest margin, in words."""
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
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        title = f"{self.situation}: {self.plan} ({self.repeats} rounds, {self.margin_range()})"
        return "\n".join([title, "leaves; ms, and the 99th percentile", *lines])


# To and from JSON values.
LATENCIES = TypeAdapter(Latencies)


def transitions(sizes: Sequence[int]) -> list[Transition]:
    """From no leaf straight to every size, and from every size to the next.

    Not from every size to all larger ones: each takes a set of prepared weights of its own, and
    those of all together would drive one another out (`treeify.fusion.prepared_weights`).
    """
    return [*((0, size) for size in sizes), *pairwise(sizes)]


@dataclass
class Slowdown:
    """How slow the machine is at present: recent times over the typical ones.

    Other work on a machine slows down several transitions in a row, those of the next session too.
    The median of the last three, of any session, tells such a spell from a single slow transition.
    """

    recent: tuple[float, ...] = ()


@dataclass
class Forecast:
    """How long a session's next transition is likely to take, by what was observed so far.

    This session's transitions took `spent` seconds where `expected` are typical. The slowdown is
    that of the sessions before; it also learns from this one.
    """

    typical: Mapping[Transition, float]
    slowdown: Slowdown
    spent: float = 0.0
    expected: float = 0.0

    def seconds(self, transition: Transition) -> float:
        """The typical time, times the recent slowdown or this session's if that is larger."""
        ratio = median(self.slowdown.recent) if self.slowdown.recent else 1.0
        if self.expected:
            # A session cannot wait for a median of three: its own deadline is at stake.
            ratio = max(ratio, self.spent / self.expected)
        return self.typical[transition] * ratio

    def observe(self, transition: Transition, seconds: float) -> None:
        """Learn from a transition."""
        if typical := self.typical[transition]:
            self.slowdown.recent = (*self.slowdown.recent, seconds / typical)[-3:]
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
    """Time every transition between nested sizes in rounds, each in an order of its own.

    Every session comes from `start` and runs in `situation` by `plan`. After one round to warm up
    there are `repeats`, but none begins after `budget` seconds once five are measured.

    Raises:
        InputError: fewer than two rounds give no spread, or the budget is no time.
    """
    require_integer("repeats", repeats, 2, next_step="One round shows no spread: take 50.")
    require_number("budget", budget, 0, finite=False, expected="seconds of at least 0")
    order = random.Random(0)
    timings: list[list[tuple[Transition, float]]] = []
    begin = time.perf_counter()
    rounds = 0
    for count in range(repeats + 1):
        if count > _MIN_ROUNDS and time.perf_counter() - begin > budget:
            break
        for path in _paths(sizes, order):
            session, times = start(), []
            for transition in path:
                before = time.perf_counter()
                session.advance(to=transition[1])
                times.append((transition, time.perf_counter() - before))
            if count:  # round 0 warms up
                timings.append(times)
        rounds = count
    columns: dict[Transition, list[float]] = {key: [] for key in transitions(sizes)}
    for transition, seconds in chain.from_iterable(timings):
        columns[transition].append(seconds)
    typical = {key: median(column) for key, column in columns.items()}
    ratios = _forecast_errors(timings, typical)
    rows = [
        Latency(*key, typical[key], _percentile(column), _percentile(ratios[key]))
        for key, column in columns.items()
    ]
    return Latencies(situation, plan, sizes, tuple(rows), rounds)


def _paths(sizes: Sequence[int], order: random.Random) -> Iterator[list[Transition]]:
    """Sessions that make every transition at least once, in random order."""
    remaining = transitions(sizes)
    order.shuffle(remaining)
    while remaining:
        start, stop = remaining[0]
        path = [(0, start)] if start else []
        while True:
            path.append((start, stop))
            remaining = [transition for transition in remaining if transition not in path]
            following = [transition for transition in remaining if transition[0] == stop]
            if not following:
                break
            start, stop = following[0]
        yield path


def _forecast_errors(
    timings: Sequence[Sequence[tuple[Transition, float]]], typical: Mapping[Transition, float]
) -> dict[Transition, list[float]]:
    """What each transition took over what would have been forecast before it.

    Forecasts learn from one session to the next here as they do in use, so that a margin covers
    only what the slowdown did not foretell.
    """
    slowdown = Slowdown()
    ratios: dict[Transition, list[float]] = {key: [] for key in typical}
    for times in timings:
        forecast = Forecast(typical, slowdown)
        for transition, seconds in times:
            likely = forecast.seconds(transition)
            ratios[transition].append(seconds / likely if likely else 1.0)
            forecast.observe(transition, seconds)
    return ratios


def _percentile(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[_PERCENT - 1]


def advance_until(
    session: Session,
    latencies: Latencies,
    deadline: float,
    begin: float,
    *,
    slowdown: Slowdown | None = None,
    observe: Callable[[Answer], None] = lambda answer: None,
) -> None:
    """Go straight to the largest size forecast to end in time, then on while the next one fits.

    A session without leaves always computes the first leaf. A forecast is the transition's typical
    time, times the recent slowdown or this session's if that is larger, times the transition's
    margin. The time that is then left decides again.

    The session is of the latencies' situation, at 0 leaves or a nested size. `deadline` counts from
    `begin`, a `time.perf_counter()`. The slowdown of the sessions before also learns from this one.
    `observe` is called with every answer; its time counts.
    """
    forecast = Forecast(latencies.typical, Slowdown() if slowdown is None else slowdown)
    while larger := [key for key in latencies.typical if key[0] == session.leaves]:
        now = time.perf_counter()
        remaining = deadline - (now - begin)
        fitting = [
            transition
            for transition in larger
            if forecast.seconds(transition) * latencies.margins[transition] <= remaining
        ]
        if not fitting and session.leaves:
            break
        transition = max(fitting) if fitting else min(larger)
        answer = session.advance(to=transition[1])
        forecast.observe(transition, time.perf_counter() - now)
        observe(answer)


def check_deadline(deadline: float) -> None:
    """Raise InputError unless a deadline is a positive number of seconds, perhaps infinite."""
    if not is_number(deadline) or deadline <= 0:
        raise InputError(
            f"deadline={described(deadline)} has passed before it began, or is none.",
            expected="seconds above 0",
            next_step="20 ms are deadline=0.02; leave it out to take all the time that is needed.",
        )


def find(measured: Mapping[Situation, Latencies], situation: Situation, plan: Plan) -> Latencies:
    """The latencies measured for a situation.

    Raises:
        InputError: there are none, or they were measured for another machine, shape or plan.
    """
    latencies = measured.get(situation)
    if latencies is not None and latencies.plan == plan:
        return latencies
    others = "; ".join(
        f"{other}, {other.machine}, {latencies.plan}" for other, latencies in measured.items()
    )
    raise InputError(
        "no latencies are known for this input on this machine.",
        expected=f"{situation}, {situation.machine}, {plan}",
        found=others or "none, the ensemble has not been calibrated",
        next_step="Measure them with hne.calibrate(x), or treeify calibrate DIR on files.",
    )
