"""Answers by a deadline: latencies measured beforehand, and the clock checked between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from treeify.anytime import Session
from treeify.errors import InputError
from treeify.execution import Plan, Situation

# Latencies are promises: of 100 measurements, 99 were this fast or faster.
_QUANTILE = 99


@dataclass(frozen=True)
class Latencies:
    """How long every step of a session took on this machine.

    Args:
        situation: the input's shape and the machine.
        plan: how the ensemble ran.
        sizes: the nested sizes, one for each step.
        typical: median seconds of each step.
        slow: the 99th percentile of the seconds of each step.
        repeats: how many sessions were measured.
    """

    situation: Situation
    plan: Plan
    sizes: tuple[int, ...]
    typical: tuple[float, ...]
    slow: tuple[float, ...]
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Latencies:
        """What `to_dict` wrote."""
        return cls(
            Situation.from_dict(values["situation"]),
            Plan.from_dict(values["plan"]),
            sizes=tuple(values["sizes"]),
            typical=tuple(values["typical"]),
            slow=tuple(values["slow"]),
            repeats=values["repeats"],
        )

    def __str__(self) -> str:
        """One line per size, with the time from the start in milliseconds."""
        lines = [f"{self.situation}: {self.plan} ({self.repeats} sessions)"]
        typical = slow = 0.0
        for size, own, worst in zip(self.sizes, self.typical, self.slow, strict=True):
            typical, slow = typical + own, slow + worst
            word = "leaf" if size == 1 else "leaves"
            lines.append(f"{size:6} {word:6}  {1e3 * typical:9.2f} ms, at most {1e3 * slow:9.2f}")
        return "\n".join(lines)


def measure(
    start: Callable[[], Session],
    situation: Situation,
    plan: Plan,
    sizes: tuple[int, ...],
    *,
    repeats: int,
    budget: float,
) -> Latencies:
    """Time the steps of many sessions.

    Args:
        start: begins a session.
        situation: what the sessions run on.
        plan: how they run.
        sizes: the nested sizes.
        repeats: how many sessions, after two to warm up.
        budget: seconds; after it no session begins, once ten are measured.

    Raises:
        InputError: fewer than two sessions give no spread.
    """
    if repeats < 2:
        raise InputError(f"repeats={repeats} shows no spread.", expected="at least 2")
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    for count in range(repeats + 2):
        if count >= 12 and time.perf_counter() - begin > budget:
            break
        session, before, times = start(), 0.0, []
        for size in sizes:
            elapsed = session.advance(to=size).elapsed
            times.append(elapsed - before)
            before = elapsed
        rounds.append(times)
    columns = list(zip(*rounds[2:], strict=True))
    slow = tuple(quantiles(column, n=100, method="inclusive")[_QUANTILE - 1] for column in columns)
    return Latencies(situation, plan, sizes, tuple(map(median, columns)), slow, len(rounds) - 2)


def advance_until(session: Session, latencies: Latencies, deadline: float, begin: float) -> None:
    """Add leaves to a session as long as the next step is expected to end in time.

    The first step is always taken. When steps take longer than they typically did, as on a machine
    that has other work, the next one is expected to take longer in proportion.

    Args:
        session: a new session.
        latencies: of the session's situation.
        deadline: seconds after `begin`.
        begin: when the clock started, in seconds of `time.perf_counter()`.
    """
    expected = 0.0
    steps = zip(latencies.sizes, latencies.typical, latencies.slow, strict=True)
    for number, (size, typical, slow) in enumerate(steps):
        slowdown = max(1.0, session.elapsed / expected) if expected else 1.0
        ends = time.perf_counter() - begin + max(slow, typical * slowdown)
        if number and ends > deadline:
            break
        session.advance(to=size)
        expected += typical


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
