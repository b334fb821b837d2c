"""Answers by a deadline: under a clock that only the steps move, and with what was measured."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_exports
from tiny_exports import SIZES, Tiny

from treeify.anytime import deadline as pytorch
from treeify.deploy import runtime
from treeify.deploy.runtime import Anytime, ExportError, Forecast, InputError, Latencies, Session

STEPS = ((0, 1), (1, 2), (2, 4))
IMAGES = np.zeros((2, 3, 4, 4), np.float32)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_exports.write(tmp_path / "tiny")


@pytest.fixture
def model(tiny: Tiny) -> Anytime:
    return Anytime(tiny.path, threads=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only where the test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(runtime, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def take(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let steps take so many seconds each."""

    def set_seconds(*seconds: float) -> None:
        original = Session._run

        def run(session: Session, step: Any, graph: Any) -> None:
            clock.now += seconds[session._done]
            original(session, step, graph)

        monkeypatch.setattr(Session, "_run", run)

    return set_seconds


def _know(model: Anytime, *seconds: float, margin: float = 1.0, opening: float = 0.0) -> None:
    """Latencies of the three steps."""
    typical = dict(zip(STEPS, seconds, strict=True))
    typical |= {(0, 2): sum(seconds[:2]), (0, 4): sum(seconds)}
    margins = dict.fromkeys(typical, margin)
    situation, openings = model._situation(IMAGES), 3 * (opening,)
    model._measured = {
        situation: Latencies(
            situation, model._checksum, SIZES, openings, 50, typical, typical, margins
        )
    }


@pytest.mark.parametrize(
    ("deadline", "leaves"),
    [(1e-9, 1), (1.0, 1), (1.49, 1), (1.5, 2), (3.49, 2), (3.5, 4), (math.inf, 4)],
)
def test_the_largest_size_that_fits(
    model: Anytime, take: Callable[..., None], deadline: float, leaves: int
) -> None:
    list(model.anytime(IMAGES))  # all files are open
    take(1.0, 0.5, 2.0)
    _know(model, 1.0, 0.5, 2.0)
    prediction = model.predict(IMAGES, deadline=deadline)
    assert prediction.leaves.tolist() == [leaves, leaves]
    assert prediction.seconds == {1: 1.0, 2: 1.5, 4: 3.5}[leaves]
    assert prediction.met == (prediction.seconds <= deadline)
    assert np.array_equal(prediction.logits, model.predict(IMAGES, leaves=leaves))


def test_forecasts_keep_a_margin(model: Anytime, take: Callable[..., None]) -> None:
    list(model.anytime(IMAGES))
    take(1.0, 0.5, 2.0)
    _know(model, 1.0, 0.5, 2.0, margin=2.0)
    assert model.predict(IMAGES, deadline=5.49).leaves[0] == 2
    assert model.predict(IMAGES, deadline=5.5).leaves[0] == 4


def test_the_clock_is_looked_at_before_every_step(
    model: Anytime, take: Callable[..., None]
) -> None:
    list(model.anytime(IMAGES))
    take(2.0, 0.5, 2.0)  # the first one is slow today, so the others may be
    _know(model, 1.0, 0.5, 2.0)
    assert model.predict(IMAGES, deadline=2.99).leaves[0] == 1


def test_a_slower_machine_is_remembered(model: Anytime, take: Callable[..., None]) -> None:
    list(model.anytime(IMAGES))
    take(3.0, 1.5, 6.0)
    _know(model, 1.0, 0.5, 2.0)
    model.predict(IMAGES, deadline=100)
    (slowdown,) = model._slowdowns.values()
    assert list(slowdown) == [3.0, 3.0, 3.0]
    assert model.predict(IMAGES, deadline=10.49).leaves[0] == 2
    assert model.predict(IMAGES, deadline=10.5).leaves[0] == 4


def test_opening_files_takes_time(
    tiny: Tiny, take: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Anytime, "_open_ahead", lambda self, indices: None)
    model = Anytime(tiny.path, threads=1, preload="none")
    take(1.0, 0.5, 2.0)
    _know(model, 1.0, 0.5, 2.0, opening=1.0)
    assert model.predict(IMAGES, deadline=4.49).leaves[0] == 1
    assert model.predict(IMAGES, deadline=4.5).leaves[0] == 2  # it was quick today: no time at all
    assert model.predict(IMAGES, deadline=3.49).leaves[0] == 2
    assert model.predict(IMAGES, deadline=6.5).leaves[0] == 4


def test_a_deadline_opens_all_files_ahead(model: Anytime) -> None:
    _know(model, 1.0, 1.0, 1.0)
    model.predict(IMAGES, deadline=1e-9)
    assert model._asked == {0, 1, 2}


def test_answers_are_observed(model: Anytime, take: Callable[..., None]) -> None:
    take(1.0, 0.5, 2.0)
    _know(model, 1.0, 0.5, 2.0)
    seen: list[tuple[int, list[int]]] = []
    model.predict(
        IMAGES, deadline=1.5, observe=lambda answer, at: seen.append((answer.leaves, at.tolist()))
    )
    assert seen == [(1, [0, 1]), (2, [0, 1])]


def test_forecasts_are_those_of_pytorch() -> None:
    typical = {(0, 1): 1.0, (1, 2): 0.5, (2, 4): 0.0}
    generator = np.random.default_rng(0)
    slowdown, mine = pytorch.Slowdown(), Forecast(typical).slowdown
    for _ in range(5):
        theirs, ours = pytorch.Forecast(typical, slowdown), Forecast(typical, mine)
        for key in typical:
            assert theirs.seconds(key) == ours.seconds(key)
            seconds = float(generator.uniform(0.1, 3))
            theirs.observe(key, seconds)
            ours.observe(key, seconds)
            assert slowdown.recent == tuple(mine)


def test_calibration_measures_steps_and_their_sums(
    model: Anytime, take: Callable[..., None]
) -> None:
    take(1.0, 0.5, 2.0)
    latencies = model.calibrate(IMAGES, repeats=6)
    assert latencies.repeats == 6
    assert latencies.sizes == SIZES
    assert latencies.typical == {(0, 1): 1.0, (1, 2): 0.5, (2, 4): 2.0, (0, 2): 1.5, (0, 4): 3.5}
    assert latencies.slow == latencies.typical
    assert set(latencies.margins.values()) == {1.0}
    assert model.latencies == {latencies.situation: latencies}
    text = str(latencies)
    assert "2x3x4x4 float32" in text
    assert "1000.00 (1000.00)  1500.00 (1500.00)  3500.00 (3500.00)" in text
    assert "(6 rounds, margins 1.00 to 1.00)" in text


def test_margins_are_those_of_pytorch(model: Anytime, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    timings = generator.uniform(0.5, 1.5, (20, 3)).tolist()
    mine = runtime._summary(timings, SIZES, "here", "0", (0.0,) * 3)
    rows = [list(zip(STEPS, times, strict=True)) for times in timings]
    typical = {key: mine.typical[key] for key in STEPS}
    errors = pytorch._forecast_errors(rows, typical)
    for key in STEPS:
        assert mine.margins[key] == pytest.approx(pytorch._percentile(errors[key]))
        assert mine.slow[key] == pytest.approx(
            pytorch._percentile([times[STEPS.index(key)] for times in timings])
        )


def test_a_budget_of_time_ends_measuring(model: Anytime, take: Callable[..., None]) -> None:
    take(1.0, 0.5, 2.0)
    assert model.calibrate(IMAGES, budget=0).repeats == 5


@pytest.mark.parametrize(
    "options", [{"repeats": 1}, {"repeats": 2.0}, {"budget": math.nan}], ids=str
)
def test_calibrations_that_are_none(model: Anytime, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is no value it may have"):
        model.calibrate(IMAGES, **options)


def test_latencies_are_kept_beside_the_export(model: Anytime, tiny: Tiny) -> None:
    first = model.calibrate(IMAGES, repeats=2)
    second = model.calibrate(IMAGES[:1], repeats=2)
    again = Anytime(tiny.path, threads=1)
    assert again.latencies == {first.situation: first, second.situation: second}
    assert again.predict(IMAGES, deadline=60).leaves.tolist() == [4, 4]
    assert [file.name for file in tiny.path.glob("*latencies*")] == ["latencies.json"]
    # Another process adds its own.
    third = Anytime(tiny.path, threads=2).calibrate(IMAGES, repeats=2)
    fourth = again.calibrate(IMAGES, repeats=2)
    assert Anytime(tiny.path).latencies == {
        first.situation: fourth,
        second.situation: second,
        third.situation: third,
    }


@pytest.mark.parametrize(
    "change", [{"threads": 2}, {"spinning": False}, {"threads": None}], ids=str
)
def test_latencies_of_other_situations(model: Anytime, tiny: Tiny, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no latencies are known[\s\S]*has not been calibrated"):
        model.predict(IMAGES, deadline=1)
    model.calibrate(IMAGES, repeats=2)
    other = Anytime(tiny.path, **{"threads": 1, **change})
    with pytest.raises(InputError, match=r"no latencies are known[\s\S]*Found 2x3x4x4 float32, "):
        other.predict(IMAGES, deadline=1)
    with pytest.raises(InputError, match="Expected 1x3x4x4 float32"):
        model.predict(IMAGES[:1], deadline=1)


def test_latencies_of_another_export(model: Anytime, tiny: Tiny) -> None:
    model.calibrate(IMAGES, repeats=2)
    file = tiny.path / "latencies.json"
    file.write_text(file.read_text().replace(model._checksum, 64 * "0"))
    with pytest.raises(InputError, match="another export"):
        Anytime(tiny.path, threads=1).predict(IMAGES, deadline=1)


@pytest.mark.parametrize("text", ["", "{}", '{"latencies": [1]}', "[" * 10**5], ids=range(4))
def test_a_damaged_file_is_refused_and_written_anew(tiny: Tiny, text: str) -> None:
    file = tiny.path / "latencies.json"
    file.write_text(text)
    model = Anytime(tiny.path, threads=1)  # which needs it for deadlines only
    with pytest.raises(ExportError, match=r"latencies.json is damaged[\s\S]*calibrate"):
        model.predict(IMAGES, deadline=1)
    with pytest.warns(UserWarning, match=r"is damaged[\s\S]*It is written anew"):
        model.calibrate(IMAGES, repeats=2)
    assert len(json.loads(file.read_text())["latencies"]) == 1
    assert model.predict(IMAGES, deadline=60).met


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("opening", [1]),
        ("typical", [1, 2]),
        ("typical", [-1, 1, 1, 1, 1]),
        ("transitions", [[0, 1]]),
        ("transitions", [[0], [], [1, 2, 3], [0, 4], [0, 2]]),
        ("sizes", [1]),
        ("repeats", "many"),
    ],
)
def test_damaged_rows(model: Anytime, tiny: Tiny, key: str, value: object) -> None:
    model.calibrate(IMAGES, repeats=2)
    file = tiny.path / "latencies.json"
    values = json.loads(file.read_text())
    values["latencies"][0][key] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"latencies.json is damaged"):
        Anytime(tiny.path, threads=1).predict(IMAGES, deadline=1)


def test_a_directory_that_cannot_be_written(
    model: Anytime, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.warns(UserWarning, match=r"cannot be written: No space left on device"):
        model.calibrate(IMAGES, repeats=2)
    assert not list(tiny.path.glob("*latencies*"))
    assert model.predict(IMAGES, deadline=60).met


def test_a_deadline_that_can_be_kept_is(model: Anytime) -> None:
    model.calibrate(IMAGES, repeats=5)
    prediction = model.predict(IMAGES, deadline=60.0)
    assert prediction.met
    assert prediction.leaves.tolist() == [4, 4]
    assert model.predict(IMAGES, deadline=1e-9).leaves.tolist() == [1, 1]
