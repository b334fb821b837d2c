"""Answers by a deadline, under a clock that only the computation moves."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from torch.testing import assert_close

import treeify
from treeify.anytime import deadline
from treeify.anytime.deadline import (
    LATENCIES,
    Latencies,
    Latency,
    Slowdown,
    Transition,
    advance_until,
    transitions,
)
from treeify.engine import timing
from treeify.engine.plan import Plan, Situation
from treeify.errors import InputError

SIZES = (1, 3, 6)


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=clock.perf_counter)
    for module in (timing, deadline, treeify.conversion.ensemble):
        monkeypatch.setattr(module, "time", fake)
    return clock


class Transitions:
    """A session whose transitions take what they are told to."""

    def __init__(self, clock: Clock, seconds: dict[Transition, float]) -> None:
        self.clock, self.seconds = clock, seconds
        self.leaves, self.taken = 0, []  # type: ignore[var-annotated]

    def advance(self, to: int) -> Any:
        self.clock.now += self.seconds[self.leaves, to]
        self.leaves = to
        self.taken.append(to)
        return SimpleNamespace(leaves=to)


# A call costs a second however few leaves it computes, and each leaf a quarter of one.
STRAIGHT = {(a, b): 1 + (b - a) / 4 for a, b in transitions(SIZES)}


def _latencies(
    typical: dict[Transition, float] = STRAIGHT,
    margin: float = 1.0,
    some: dict[Transition, float] | None = None,
) -> Latencies:
    situation = Situation(False, (2, 3, 8, 8), "torch.float32", "here")
    margins = dict.fromkeys(typical, margin) | (some or {})
    rows = tuple(Latency(*key, typical[key], 2 * typical[key], margins[key]) for key in typical)
    return Latencies(situation, Plan(("packed",) * 3), SIZES, rows, 100)


def _times(factor: float) -> dict[Transition, float]:
    return {key: factor * seconds for key, seconds in STRAIGHT.items()}


def _taken(
    clock: Clock,
    limit: float,
    *,
    latencies: Latencies | None = None,
    actual: dict[Transition, float] = STRAIGHT,
    late: float = 0,
    slowdown: Slowdown | None = None,
) -> list[int]:
    begin = clock.now
    clock.now += late
    session = Transitions(clock, actual)
    measured = _latencies() if latencies is None else latencies
    advance_until(session, measured, limit, begin, slowdown=slowdown)  # type: ignore[arg-type]
    return session.taken


def test_transitions_go_from_nothing_to_every_size_and_from_each_to_the_next() -> None:
    assert transitions(SIZES) == [(0, 1), (0, 3), (0, 6), (1, 3), (3, 6)]


@pytest.mark.parametrize("limit", [1e-9, 0.5, 1.24])
def test_never_nothing(clock: Clock, limit: float) -> None:
    assert _taken(clock, limit) == [1]
    assert _taken(clock, limit, actual=_times(50)) == [1]


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1.25, [1]), (1.74, [1]), (1.75, [3]), (2.49, [3]), (2.5, [6]), (math.inf, [6])],
)
def test_the_largest_size_that_fits_is_taken_straight(
    clock: Clock, limit: float, sizes: list[int]
) -> None:
    assert _taken(clock, limit) == sizes


def test_the_clock_is_looked_at_between_steps(clock: Clock) -> None:
    dear = {**STRAIGHT, (0, 6): 100.0}  # the last leaves only after the third
    assert _taken(clock, 3.49, latencies=_latencies(dear), actual=dear) == [3]
    assert _taken(clock, 3.5, latencies=_latencies(dear), actual=dear) == [3, 6]
    late = {**dear, (0, 3): 1.76}
    assert _taken(clock, 3.5, latencies=_latencies(dear), actual=late) == [3]


def test_time_left_by_a_quick_step_is_used(clock: Clock) -> None:
    quick, calm = {**STRAIGHT, (0, 3): 0.5}, (1.0, 1.0, 1.0)
    assert _taken(clock, 2.24, actual=quick, slowdown=Slowdown(calm)) == [3]
    assert _taken(clock, 2.25, actual=quick, slowdown=Slowdown(calm)) == [3, 6]


def test_time_that_passed_before_the_first_step_counts(clock: Clock) -> None:
    assert _taken(clock, 2.75, late=0.25) == [6]
    assert _taken(clock, 2.75, late=0.5) == [3]
    assert _taken(clock, 2.75, late=50) == [1]


def test_forecasts_keep_a_margin(clock: Clock) -> None:
    careful = _latencies(margin=2.0)
    assert _taken(clock, 4.99, latencies=careful) == [3]
    assert _taken(clock, 5.0, latencies=careful) == [6]


def test_each_transition_has_its_own_margin(clock: Clock) -> None:
    careful = _latencies(margin=2.0, some={(0, 6): 1.0})
    assert _taken(clock, 2.5, latencies=careful) == [6]
    assert _taken(clock, 2.49, latencies=careful) == [1]
    assert _taken(clock, 3.5, latencies=_latencies(some={(0, 6): 2.0})) == [3, 6]


def test_a_step_slower_than_typical_makes_the_next_forecast_longer(clock: Clock) -> None:
    dear = {**STRAIGHT, (0, 6): 100.0}
    actual = {**dear, (0, 3): 3 * 1.75}  # three times slower than calibrated
    # A single slow one does not move the slowdown of earlier sessions, but counts in its own.
    calm = (1.0, 1.0, 1.0)
    for limit, sizes in ((3 * 3.5 - 0.01, [3]), (3 * 3.5, [3, 6])):
        slowdown = Slowdown(calm)
        assert (
            _taken(clock, limit, latencies=_latencies(dear), actual=actual, slowdown=slowdown)
            == sizes
        )


def test_a_slower_machine_is_remembered_by_the_next_session(clock: Clock) -> None:
    slowdown = Slowdown()
    assert _taken(clock, 2.5, actual=_times(3), slowdown=slowdown) == [6]  # 5 seconds too late
    assert slowdown.recent == (3.0,)
    assert _taken(clock, 7.49, actual=_times(3), slowdown=slowdown) == [3]
    assert _taken(clock, 7.5, actual=_times(3), slowdown=slowdown) == [6]


def test_a_faster_machine_is_remembered_by_the_next_session(clock: Clock) -> None:
    slowdown = Slowdown()
    assert _taken(clock, 1.24, actual=_times(0.5), slowdown=slowdown) == [1]
    assert _taken(clock, 1.24, actual=_times(0.5), slowdown=slowdown) == [3]
    assert _taken(clock, 1.25, actual=_times(0.5), slowdown=slowdown) == [6]


def test_a_single_slow_step_is_no_slow_machine(clock: Clock) -> None:
    slowdown = Slowdown((1.0, 1.0, 9.0))
    assert _taken(clock, 2.5, slowdown=slowdown) == [6]
    assert slowdown.recent == (1.0, 9.0, 1.0)


def test_steps_that_took_no_time_when_calibrated(clock: Clock) -> None:
    nothing = dict.fromkeys(STRAIGHT, 0.0)
    assert _taken(clock, 5.0, latencies=_latencies(nothing), actual=nothing) == [6]


def test_every_answer_is_observed(clock: Clock) -> None:
    sizes: list[int] = []
    quick = {**STRAIGHT, (0, 3): 0.5}
    advance_until(
        Transitions(clock, quick),  # type: ignore[arg-type]
        _latencies(),
        *(2.25, clock.now),
        observe=lambda answer: sizes.append(answer.leaves),
    )
    assert sizes == [3, 6]


def _timed(
    hne: treeify.HierarchicalEnsemble, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], None]:
    """Let every step of a session take one second, and one more per leaf, times a factor."""
    speed = [1.0]
    compute = treeify.anytime.session.Session._compute

    def slowly(self: Any, to: int) -> None:
        clock.now += speed[0] * (1 + to - self.leaves)
        compute(self, to)

    monkeypatch.setattr(treeify.anytime.session.Session, "_compute", slowly)

    def set_speed(seconds: float) -> None:
        speed[0] = seconds

    return set_speed


def test_predictions_meet_deadlines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(), small.images()
    set_speed = _timed(hne, clock, monkeypatch)
    latencies = hne.calibrate(x, repeats=12, budget=math.inf)
    assert hne.latencies == {Situation.of(x, training=False): latencies}
    assert latencies.sizes == hne.tree.nested_sizes
    expected = {(a, b): 1 + b - a for a, b in transitions(SIZES)}
    assert latencies.typical == pytest.approx(expected)
    assert latencies.slow == pytest.approx(expected)
    assert latencies.margins == pytest.approx(dict.fromkeys(expected, 1))
    assert latencies.repeats == 12
    for limit, leaves in ((0.1, 1), (3.9, 1), (4.1, 3), (6.9, 3), (7.1, 6), (math.inf, 6)):
        begin = clock.now
        prediction = hne.predict(x, deadline=limit)
        assert clock.now - begin == prediction.seconds == pytest.approx(1 + leaves)
        assert prediction.met == (1 + leaves <= limit)
        assert prediction.leaves.tolist() == [leaves] * len(x)
        assert_close(prediction.logits, hne.predict(x, leaves=leaves).detach())
    set_speed(2.0)
    for _ in range(2):
        hne.predict(x, deadline=math.inf)
    begin = clock.now
    assert_close(hne.predict(x, deadline=13.9).logits, hne.predict(x, leaves=3).detach())
    assert clock.now - begin == pytest.approx(8)
    assert hne.calibrate(x, repeats=2).typical[0, 6] == pytest.approx(14)
    assert_close(hne.predict(x, deadline=14.1).logits, hne.predict(x).detach())


def test_rounds_meet_every_transition_in_changing_order(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hne, x = small.ensemble(), small.images()
    taken: list[tuple[int, int]] = []
    compute = treeify.anytime.session.Session._compute

    def remembered(self: Any, to: int) -> None:
        taken.append((self.leaves, to))
        compute(self, to)

    monkeypatch.setattr(treeify.anytime.session.Session, "_compute", remembered)
    hne.calibrate(x, repeats=8, budget=math.inf)
    for transition in transitions(SIZES):
        assert taken.count(transition) >= 9  # one round warms up
    assert len({tuple(taken[start : start + 4]) for start in range(0, len(taken), 4)}) > 4
    state = torch.get_rng_state()
    hne.calibrate(x, repeats=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_typical_slow_and_margin_of_times_that_vary(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hne, x = small.ensemble(["stage1"]), small.images()
    set_speed = _timed(hne, clock, monkeypatch)
    session, count = hne.session, [0]

    def start(x: torch.Tensor) -> treeify.anytime.session.Session:
        count[0] += 1
        warming, rare = count[0] <= 3, count[0] == 50  # one more session checks the input
        set_speed(1000.0 if warming else 500.0 if rare else 1.0 + (count[0] % 10 in (0, 5)))
        return session(x)

    monkeypatch.setattr(hne, "session", start)
    latencies = hne.calibrate(x, repeats=200, budget=math.inf)
    assert latencies.repeats == 200
    assert latencies.typical == pytest.approx({(0, 1): 2, (0, 2): 3, (1, 2): 2})
    assert latencies.slow == pytest.approx({(0, 1): 4, (0, 2): 6, (1, 2): 4})
    # A session that was slow so far is known to be slow: its next step needs no margin.
    assert latencies.margins == pytest.approx({(0, 1): 2, (0, 2): 2, (1, 2): 1})


def test_a_slow_spell_needs_no_margin(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(["stage1"]), small.images()
    set_speed = _timed(hne, clock, monkeypatch)
    session, count = hne.session, [0]

    def start(x: torch.Tensor) -> treeify.anytime.session.Session:
        count[0] += 1
        set_speed(1.0 + (count[0] > 200))
        return session(x)

    monkeypatch.setattr(hne, "session", start)
    latencies = hne.calibrate(x, repeats=150, budget=math.inf)  # two sessions each
    assert latencies.slow[0, 1] == pytest.approx(4)
    assert latencies.margins == pytest.approx(dict.fromkeys(latencies.typical, 1))


def test_calibration_stops_when_its_budget_is_spent(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hne, x = small.ensemble(["stage1"]), small.images()
    _timed(hne, clock, monkeypatch)
    # A round takes 2 + 2 seconds by one leaf and 3 straight.
    assert hne.calibrate(x, repeats=100, budget=1.0).repeats == 5
    assert hne.calibrate(x, repeats=100, budget=7 * 20 - 1).repeats == 19
    assert hne.calibrate(x, repeats=8, budget=math.inf).repeats == 8


@pytest.mark.parametrize("repeats", [0, 1, -3])
def test_too_few_sessions_are_refused(repeats: int) -> None:
    hne = small.ensemble()
    with pytest.raises(InputError):
        hne.calibrate(small.images(), repeats=repeats)
    assert hne.latencies == {}


def test_deadlines_need_calibration() -> None:
    hne, x = small.ensemble(), small.images()
    with pytest.raises(InputError, match=r"none, the ensemble has not been calibrated"):
        hne.predict(x, deadline=1.0)
    hne.calibrate(x, repeats=2)
    assert hne.predict(x, deadline=100.0).logits.shape == (2, small.CLASSES)
    with pytest.raises(InputError, match=r"inference, 3x3x8x8 float32"):
        hne.predict(small.images(3), deadline=1.0)
    with pytest.raises(InputError, match=r"inference, 2x3x16x16 float32"):
        hne.predict(torch.zeros(2, 3, 16, 16), deadline=1.0)


def test_latencies_of_another_machine_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(), small.images()
    hne.calibrate(x, repeats=2)
    monkeypatch.setattr(timing, "describe", lambda device: "another machine")
    with pytest.raises(InputError, match="another machine"):
        hne.predict(x, deadline=1.0)


def test_a_change_of_how_levels_run_asks_for_calibration() -> None:
    hne, x = small.ensemble(), small.images()
    hne.calibrate(x, repeats=2)
    hne.execution = "looped"
    with pytest.raises(InputError, match=r"Expected .*looped looped looped"):
        hne.predict(x, deadline=1.0)
    hne.calibrate(x, repeats=2)
    hne.predict(x, deadline=1.0)
    hne.execution = "auto"
    plan = hne.tune(x, repeats=1).plan
    assert plan.fuse
    with pytest.raises(InputError, match="fused"):
        hne.predict(x, deadline=1.0)
    assert hne.calibrate(x, repeats=2).plan == plan
    hne.predict(x, deadline=1.0)


@pytest.mark.parametrize("limit", [0, 0.0, -1.0, math.nan, -math.inf])
def test_deadlines_that_have_passed(limit: float) -> None:
    hne, x = small.ensemble(), small.images()
    hne.calibrate(x, repeats=2)
    with pytest.raises(InputError, match="has passed"):
        hne.predict(x, deadline=limit)


def test_training_mode_and_several_limits_are_refused() -> None:
    hne, x = small.ensemble(), small.images()
    hne.calibrate(x, repeats=2)
    for limits in ({"leaves": 1}, {"confidence": 0.5}):
        with pytest.raises(InputError, match="several limits"):
            hne.predict(x, deadline=1.0, **limits)  # type: ignore[call-overload]
    hne.train()
    with pytest.raises(InputError, match=r"hne\.eval"):
        hne.predict(x, deadline=1.0)
    with pytest.raises(InputError, match=r"hne\.eval"):
        hne.calibrate(x)


def test_latencies_survive_json_and_print() -> None:
    latencies = _latencies(
        {key: seconds / 1000 for key, seconds in STRAIGHT.items()}, 1.2, {(1, 3): 1.5}
    )
    assert LATENCIES.validate_json(LATENCIES.dump_json(latencies, by_alias=True)) == latencies
    assert str(latencies).splitlines()[0].endswith("(100 rounds, margins 1.20 to 1.50)")
    assert [line.split() for line in str(latencies).splitlines()[2:]] == [
        ["from", "to", "1", "to", "3", "to", "6"],
        ["0", "1.25", "(2.50)", "1.75", "(3.50)", "2.50", "(5.00)"],
        ["1", "1.50", "(3.00)"],
        ["3", "1.75", "(3.50)"],
    ]
