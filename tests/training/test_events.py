"""Epochs as lines of a file, and as numbers for trackers."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import runs

from treeify.evaluation.metrics import Score
from treeify.training.events import EPOCH, Epoch, flat
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


def test_trackers_are_told(recipe_file: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(load_recipe(recipe_file, ["trackers=[tensorboard]"]))
    (events,) = result.run.directory.rglob("events.out.*")
    accumulator = EventAccumulator(str(events.parent)).Reload()
    accuracy = accumulator.Scalars("held_out/accuracy/4")
    assert [point.step for point in accuracy] == [runs.TINY_STEPS, 2 * runs.TINY_STEPS]
    assert result.last is not None
    assert accuracy[-1].value == pytest.approx(result.last.held_out[-1].accuracy)
    assert not [tag for tag in accumulator.Tags()["scalars"] if "/leaves/" in tag]


def test_weights_and_biases_is_told(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    result = train(load_recipe(recipe_file, ["trackers=[wandb]"]))
    (log,) = tmp_path.rglob("run-*.wandb")
    assert result.last is not None
    texts = [
        text.encode()
        for score in result.last.held_out
        for text in (f"held_out/nll/{score.leaves}", str(score.nll))
    ]
    # Its own process writes the file, on a busy machine after the run has ended.
    end = time.monotonic() + 60
    while (missing := [text for text in texts if text not in log.read_bytes()]) and (
        time.monotonic() < end
    ):
        time.sleep(0.1)
    assert not missing


def test_an_epoch_comes_back_from_its_line_and_flat_has_its_numbers() -> None:
    scores = Score(1, 50.0, 2.5, math.inf, 0.0), Score(2, 60.0, 2.0, 3.0, 0.1)
    epoch = Epoch(3, 12, 1.5, 0.25, 2.25, scores, scores[:1], skipped=4)
    assert EPOCH.validate_python(json.loads(json.dumps(asdict(epoch)))) == epoch
    numbers = flat(epoch)
    assert numbers["train/nll/2"] == 2.0
    assert numbers["held_out/accuracy/1"] == 50.0
    assert len(numbers) == 3 + 3 * 4
