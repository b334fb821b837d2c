"""Runs that are killed, run out of space, meet damaged files or lose a process; and go on."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import runs

from treeify import files
from treeify.errors import CheckpointError
from treeify.training import trainer
from treeify.training.events import Epoch, Reporter, RunSize, Step
from treeify.training.recipe import Recipe
from treeify.training.run_directory import state_name
from treeify.training.trainer import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(runs.recipe(folder), out=folder / "run")
    return folder / "run"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return runs.recipe(tmp_path, "checkpoints.minutes=1e-9", "checkpoints.keep=3")


class Listener(Reporter):
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.warnings: list[str] = []
        self.stepped = self.steps.append
        self.warned = self.warnings.append


def without_times(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{**line, "seconds": 0, "waiting": 0} for line in lines]


def assert_ends_like(whole: Path, run: Path) -> None:
    for name in ("last", "best", "last/ema"):
        runs.assert_same_bits(whole, run, name)
    assert without_times(run) == without_times(whole)
    assert not list(run.rglob(".*"))


# When a process is killed with -9: a function of whom, at which call, before or after it.
MOMENTS = {
    "before the first state": ("treeify.training.trainer:Trainer", "_accumulate", 1, False),
    "in a step": ("treeify.training.trainer:Trainer", "_accumulate", 6, False),
    "while measuring": ("treeify.training.trainer", "measure", 1, False),
    "before the metrics": ("treeify.training.trainer:Trainer", "_finish_epoch", 1, False),
    "in a save, weights written": ("treeify.training.state_file", "write_state", 3, False),
    "in a save, not yet named": ("treeify.files", "_bring_to_disk", 9, False),
    "between name and link": ("treeify.files", "point", 4, False),
    "between last and best": ("treeify.files", "point", 6, False),
    "after the last step": ("treeify.training.trainer:Trainer", "_step", 2 * runs.STEPS, True),
}


MOMENTS_BY_DEFAULT = ("in a step", "in a save, not yet named")


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=[] if moment in MOMENTS_BY_DEFAULT else [pytest.mark.thorough])
        for moment in MOMENTS
    ],
)
def test_a_killed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path, moment: str) -> None:
    file = runs.written(tmp_path, "checkpoints.minutes=1e-9", "checkpoints.keep=3")
    assert runs.killed(file, *MOMENTS[moment]) == -signal.SIGKILL
    train(runs.load_recipe(file), resume=tmp_path / "run")
    assert_ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize("step", range(1, 2 * runs.STEPS))
def test_a_stopped_run_goes_on_from_every_step(
    whole: Path, recipe: Recipe, tmp_path: Path, step: int
) -> None:
    class Stop(Listener):
        def __init__(self) -> None:
            super().__init__()
            self.stepped = self.stop

        def stop(self, event: Step) -> None:
            self.steps.append(event)
            if len(self.steps) == step:
                signal.raise_signal(signal.SIGTERM)

    stopped, going_on = Stop(), Listener()
    assert train(recipe, out=tmp_path / "run", reporter=stopped).interrupted
    result = train(recipe, resume=tmp_path / "run", reporter=going_on)
    assert result.last is not None and result.last.epoch == 2
    assert len(stopped.steps) + len(going_on.steps) == 2 * runs.STEPS
    assert_ends_like(whole, tmp_path / "run")


def test_a_finished_run_has_nothing_left_to_do(whole: Path, recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    listener = Listener()
    result = train(recipe, resume=tmp_path / "run", reporter=listener)
    assert not listener.steps
    assert isinstance(result.last, Epoch)
    assert_ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.safetensors", "trainer.json"])
def test_a_truncated_state_is_put_aside_and_the_one_before_it_taken(
    whole: Path, recipe: Recipe, tmp_path: Path, file: str
) -> None:
    train(recipe, out=tmp_path / "run")
    newest = (tmp_path / "run" / "last").resolve()
    damaged = newest / file
    damaged.write_bytes(damaged.read_bytes()[:-100])
    listener = Listener()
    train(recipe, resume=tmp_path / "run", reporter=listener)
    (warning,) = listener.warnings
    assert str(newest) in warning
    assert (newest.parent / f"damaged-{newest.name}" / file).stat().st_size
    assert_ends_like(whole, tmp_path / "run")


def test_a_full_disk_ends_in_one_message_and_a_run_that_goes_on(
    whole: Path, recipe: Recipe, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(Reporter):
        def stepped(self, step: Step) -> None:
            if step.step == 3:  # from now on, no file may grow beyond 10 kB
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    try:
        with pytest.raises(CheckpointError, match=r"(?s)cannot be written.*--resume"):
            train(recipe, out=tmp_path / "run", reporter=Fill())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "run" / "last").resolve().name == state_name(2, 0)
    train(recipe, resume=tmp_path / "run")
    assert_ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize("function", ["append_line", "point"])
def test_a_disk_that_fills_up_at_an_epochs_end(
    whole: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Whatever is written then; `os.fsync` reports what the kernel could not keep."""
    original = getattr(files, function)

    def full(path: Path, *args: object) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if "epoch-0001" in str(args) or function == "append_line":
            monkeypatch.setattr(os, "fsync", fsync)
        original(path, *args)

    monkeypatch.setattr(files, function, full)
    with pytest.raises(CheckpointError, match=r"(?s)No space left.*--resume"):
        train(recipe, out=tmp_path / "run")
    monkeypatch.undo()
    train(recipe, resume=tmp_path / "run")
    assert_ends_like(whole, tmp_path / "run")


def test_only_the_newest_states_and_the_best_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, out=tmp_path / "run")
    states = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    best = (tmp_path / "run" / "best").resolve().name
    newest = [state_name(6, 1), state_name(7, 1), state_name(8, 2)]
    assert states == sorted({best, *newest})


def test_a_run_of_another_recipe_is_not_touched(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    other = runs.recipe(tmp_path, "optimizer.lr=0.1", "loss.alpha=0.2")
    with pytest.raises(CheckpointError) as caught:
        train(other, resume=tmp_path / "run")
    for text in (
        "optimizer.lr: 0.1, the run has 0.05",
        "loss.alpha: 0.2",
        "treeify train --resume",
    ):
        assert text in str(caught.value)
    with pytest.raises(CheckpointError, match="holds no run"):
        train(other, resume=tmp_path)
    assert_ends_like(whole, tmp_path / "run")


def test_states_that_are_all_damaged_are_no_new_beginning(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, out=tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    for state in (tmp_path / "run" / "checkpoints").iterdir():
        (state / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match="every state"):
        train(recipe, resume=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_a_copied_run_goes_on_and_other_files_stay(
    whole: Path, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")  # links become directories
    (tmp_path / "run" / ".git").mkdir()
    (tmp_path / "run" / ".notes.1").write_text("mine")
    train(recipe, resume=tmp_path / "run")
    assert (tmp_path / "run" / "last").is_symlink()
    assert (tmp_path / "run" / ".git").is_dir()
    assert (tmp_path / "run" / ".notes.1").read_text() == "mine"
    runs.assert_same_bits(whole, tmp_path / "run")


def test_a_run_that_is_alive_is_not_resumed(recipe: Recipe, tmp_path: Path) -> None:
    class Twice(Reporter):
        def stepped(self, step: Step) -> None:
            with pytest.raises(CheckpointError, match="another process trains"):
                train(recipe, resume=tmp_path / "run")
            signal.raise_signal(signal.SIGINT)

    train(recipe, out=tmp_path / "run", reporter=Twice())


def test_a_tuned_run_goes_on_with_its_plan_and_layout(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "tune=true", "channels_last=true")
    plans = []

    class Stop(Reporter):
        def started(self, run: RunSize) -> None:
            weight = run.hne.get_submodule("block4.0.conv2").weight
            plans.append((run.hne.tunings, weight.stride()))

        def stepped(self, step: Step) -> None:
            if step.step == 2 and len(plans) == 1:
                signal.raise_signal(signal.SIGINT)

    train(recipe, out=tmp_path / "run", reporter=Stop())
    train(recipe, resume=tmp_path / "run", reporter=Stop())
    assert plans[0] == plans[1]


def test_a_model_that_cannot_be_imported_damages_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vanishing.py").write_text(runs.NORMLESS)
    recipe = runs.recipe(
        tmp_path,
        "model.name=vanishing:net",
        "model.kwargs={}",
        "model.splits=1",
        "schedule.epochs=1",
    )
    train(recipe, out=tmp_path / "run")
    (tmp_path / "vanishing.py").unlink()
    monkeypatch.delitem(__import__("sys").modules, "vanishing")
    states = sorted((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(trainer.TreeifyError, match="vanishing"):
        train(recipe, resume=tmp_path / "run")
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == states
