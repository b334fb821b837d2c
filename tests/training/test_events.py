"""Trackers get the numbers of every epoch."""

from pathlib import Path

import pytest
import runs

from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


def test_trackers_are_told(recipe_file: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(load_recipe(recipe_file, ["trackers=[tensorboard]"]))
    (events,) = result.run.directory.rglob("events.out.*")
    found = EventAccumulator(str(events.parent)).Reload()
    accuracy = found.Scalars("held_out/accuracy/4")
    assert [own.step for own in accuracy] == [runs.TINY_STEPS, 2 * runs.TINY_STEPS]
    assert result.last is not None
    assert accuracy[-1].value == pytest.approx(result.last.held_out[-1].accuracy)
    assert not [tag for tag in found.Tags()["scalars"] if "/leaves/" in tag]


def test_weights_and_biases_is_told(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    result = train(load_recipe(recipe_file, ["trackers=[wandb]"]))
    (log,) = tmp_path.rglob("run-*.wandb")
    told = log.read_bytes()
    assert result.last is not None
    for own in result.last.held_out:
        assert f"held_out/nll/{own.leaves}".encode() in told
        assert str(own.nll).encode() in told
