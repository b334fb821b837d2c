"""Answers by a deadline, under a clock that only the computation moves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from torch.testing import assert_close

import treeify
from treeify import deadline, machine
from treeify.deadline import Latencies, advance_until
from treeify.errors import InputError
from treeify.execution import Plan, Situation

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
    for module in (machine, deadline, treeify.ensemble):
        monkeypatch.setattr(module, "time", fake)
    return clock


class Steps:
    """A session whose steps take what they are told to."""

    def __init__(self, clock: Clock, seconds: dict[int, float]) -> None:
        self.clock, self.seconds = clock, seconds
        self.elapsed, self.taken = 0.0, []  # type: ignore[var-annotated]

    def advance(self, to: int) -> None:
        self.clock.now += self.seconds[to]
        self.elapsed += self.seconds[to]
        self.taken.append(to)


def _latencies(typical: tuple[float, ...], slow: tuple[float, ...] | None = None) -> Latencies:
    situation = Situation(False, (2, 3, 8, 8), "torch.float32", "here")
    return Latencies(situation, Plan(("packed",) * 3), SIZES, typical, slow or typical, 100)


def _taken(
    clock: Clock, latencies: Latencies, limit: float, actual: tuple[float, ...], late: float = 0
) -> list[int]:
    begin = clock.now
    clock.now += late
    steps = Steps(clock, dict(zip(SIZES, actual, strict=True)))
    advance_until(steps, latencies, limit, begin)  # type: ignore[arg-type]
    return steps.taken


@pytest.mark.parametrize("limit", [1e-9, 0.5, 0.99])
def test_never_nothing(clock: Clock, limit: float) -> None:
    latencies = _latencies((1.0, 1.0, 1.0))
    assert _taken(clock, latencies, limit, (50.0, 1.0, 1.0)) == [1]


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1.0, [1]), (2.999, [1]), (3.0, [1, 3]), (6.999, [1, 3]), (7.0, [1, 3, 6]), (math.inf, SIZES)],
)
def test_the_largest_size_that_fits_exactly(clock: Clock, limit: float, sizes: list[int]) -> None:
    times = (1.0, 2.0, 4.0)
    assert _taken(clock, _latencies(times), limit, times) == list(sizes)


def test_time_that_passed_before_the_first_step_counts(clock: Clock) -> None:
    times = (1.0, 2.0, 4.0)
    assert _taken(clock, _latencies(times), 7.0, times, late=0.5) == [1, 3]
    assert _taken(clock, _latencies(times), 7.0, times, late=50) == [1]


def test_slow_latencies_decide_where_steps_take_their_typical_time(clock: Clock) -> None:
    typical, slow = (1.0, 1.0, 1.0), (1.0, 1.0, 2.0)
    assert _taken(clock, _latencies(typical, slow), 3.5, typical) == [1, 3]
    assert _taken(clock, _latencies(typical, slow), 4.0, typical) == [1, 3, 6]


def test_a_slower_machine_takes_fewer_steps(clock: Clock) -> None:
    typical = (1.0, 2.0, 4.0)
    actual = (3.0, 6.0, 12.0)  # three times slower than calibrated
    assert _taken(clock, _latencies(typical), 8.999, actual) == [1]
    assert _taken(clock, _latencies(typical), 9.0, actual) == [1, 3]
    assert _taken(clock, _latencies(typical), 20.999, actual) == [1, 3]
    assert _taken(clock, _latencies(typical), 21.0, actual) == [1, 3, 6]


def test_a_faster_machine_is_not_trusted(clock: Clock) -> None:
    typical, actual = (1.0, 2.0, 4.0), (0.1, 0.2, 0.4)
    assert _taken(clock, _latencies(typical), 4.299, actual) == [1, 3]
    assert _taken(clock, _latencies(typical), 4.3, actual) == [1, 3, 6]


def test_steps_that_took_no_time_when_calibrated(clock: Clock) -> None:
    assert _taken(clock, _latencies((0.0, 0.0, 1.0)), 5.0, (0.0, 0.0, 1.0)) == list(SIZES)


def _timed(
    hne: treeify.HierarchicalEnsemble, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], None]:
    """Let every step of a session take some seconds per leaf."""
    speed = [1.0]
    compute = treeify.anytime.Session._compute

    def slowly(self: Any, to: int) -> None:
        clock.now += speed[0] * (to - self.leaves)
        compute(self, to)

    monkeypatch.setattr(treeify.anytime.Session, "_compute", slowly)

    def set_speed(seconds: float) -> None:
        speed[0] = seconds

    return set_speed


def test_predictions_meet_deadlines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(), small.images()
    set_speed = _timed(hne, clock, monkeypatch)
    latencies = hne.calibrate(x, repeats=12, budget=math.inf)
    assert hne.latencies == {Situation.of(x, training=False): latencies}
    assert latencies.sizes == hne.tree.nested_sizes
    assert latencies.typical == pytest.approx((1, 2, 3))
    assert latencies.slow == pytest.approx((1, 2, 3))
    assert latencies.repeats == 12
    for limit, leaves in ((0.1, 1), (2.9, 1), (3.1, 3), (5.9, 3), (6.1, 6), (math.inf, 6)):
        begin = clock.now
        found = hne.predict(x, deadline=limit)
        assert clock.now - begin == pytest.approx({1: 1, 3: 3, 6: 6}[leaves])
        assert_close(found, hne.predict(x, leaves=leaves).detach())
    set_speed(2.0)
    begin = clock.now
    assert_close(hne.predict(x, deadline=11.9), hne.predict(x, leaves=3).detach())
    assert clock.now - begin == pytest.approx(6)


def test_the_slowest_hundredth_is_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(["stage1"]), small.images()
    set_speed = _timed(hne, clock, monkeypatch)
    session, count = hne.session, [0]

    def start(x: torch.Tensor) -> treeify.anytime.Session:
        count[0] += 1
        warming, rare = count[0] <= 3, count[0] == 50  # one more session checks the input
        set_speed(1000.0 if warming else 500.0 if rare else 1.0 + (count[0] % 10 == 0))
        return session(x)

    monkeypatch.setattr(hne, "session", start)
    found = hne.calibrate(x, repeats=200, budget=math.inf)
    assert found.repeats == 200
    assert found.typical == pytest.approx((1, 1))
    assert found.slow == pytest.approx((2, 2))


def test_calibration_stops_when_its_budget_is_spent(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hne, x = small.ensemble(), small.images()
    _timed(hne, clock, monkeypatch)
    assert hne.calibrate(x, repeats=100, budget=1.0).repeats == 10
    assert hne.calibrate(x, repeats=100, budget=6 * 20 - 1).repeats == 18


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
    assert hne.predict(x, deadline=100.0).shape == (2, small.CLASSES)
    with pytest.raises(InputError, match=r"inference, 3x3x8x8 float32"):
        hne.predict(small.images(3), deadline=1.0)
    with pytest.raises(InputError, match=r"inference, 2x3x16x16 float32"):
        hne.predict(torch.zeros(2, 3, 16, 16), deadline=1.0)


def test_latencies_of_another_machine_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(), small.images()
    hne.calibrate(x, repeats=2)
    monkeypatch.setattr(machine, "describe", lambda device: "another machine")
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
    latencies = _latencies((0.001, 0.002, 0.004), (0.002, 0.003, 0.005))
    assert Latencies.from_dict(json.loads(json.dumps(latencies.to_dict()))) == latencies
    assert [line.split() for line in str(latencies).splitlines()[1:]] == [
        ["1", "leaf", "1.00", "ms,", "at", "most", "2.00"],
        ["3", "leaves", "3.00", "ms,", "at", "most", "5.00"],
        ["6", "leaves", "7.00", "ms,", "at", "most", "10.00"],
    ]


def test_latencies_are_saved_and_loaded(tmp_path: Path) -> None:
    hne, x = small.ensemble(), small.images()
    latencies = hne.calibrate(x, repeats=2)
    treeify.save(hne, tmp_path / "hne")
    again = treeify.load(tmp_path / "hne", model=small.SmallNet())
    assert again.latencies == {latencies.situation: latencies}
    assert_close(again.predict(x, deadline=100.0), hne.predict(x).detach())
