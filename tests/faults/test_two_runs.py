"""Runs begun together, over one another, after a kill, or whose directory goes away."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import runs

from treeify.errors import CheckpointError, RecipeError
from treeify.training import claim, run_lock
from treeify.training.ablation import GridRun, ablate, last_epoch
from treeify.training.events import Reporter, Step
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import dump_recipe, load_recipe
from treeify.training.run_directory import RunDirectory
from treeify.training.run_lock import LOCK, locked
from treeify.training.trainer import train


def no_warning(message: str) -> None:
    pytest.fail(message)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return runs.recipe(tmp_path, "schedule.epochs=1", "schedule.warmup_epochs=0.0")


# Begun together.


def test_many_runs_of_one_name_get_a_directory_each(recipe: Recipe) -> None:
    paths: list[Path] = []
    begin, end = threading.Barrier(8), threading.Barrier(8)

    def claimed() -> None:
        begin.wait()
        with claim.claimed(recipe, None, overwrite=False, warn=no_warning) as directory:
            paths.append(directory.path)
            end.wait()

    threads = [threading.Thread(target=claimed) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"tiny", *(f"tiny-{number}" for number in range(2, 9))}
    assert {path.name for path in paths} == names
    # None of them began. Who made `runs` may not be the last to leave it.
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_two_runs_begun_together_are_two_runs(tmp_path: Path) -> None:
    file = runs.written(tmp_path, "schedule.epochs=1", "schedule.warmup_epochs=0.0")
    started = [runs.forked(runs.train_in, tmp_path, file, f"seed={seed}") for seed in (1, 2)]
    assert runs.ends(started) == [0, 0]
    both = [tmp_path / "runs" / name for name in ("tiny", "tiny-2")]
    assert {load_recipe(run / "recipe.yaml").seed for run in both} == {1, 2}
    for run in both:
        assert [row.epoch for row in RunDirectory(run).metrics()] == [1]
        assert not list(run.rglob(".*"))
        recipe = load_recipe(run / "recipe.yaml")
        train(recipe, out=tmp_path / f"alone{recipe.seed}")
        runs.assert_same_bits(tmp_path / f"alone{recipe.seed}", run)


def test_of_two_runs_with_one_out_one_is_refused(tmp_path: Path) -> None:
    file = runs.written(tmp_path, "schedule.epochs=1", "schedule.warmup_epochs=0.0")
    started = [
        runs.forked(runs.train_in, tmp_path, file, f"seed={seed}", "--out", "run")
        for seed in (1, 2)
    ]
    assert sorted(runs.ends(started)) == [0, 2]
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    train(recipe, out=tmp_path / "alone")
    runs.assert_same_bits(tmp_path / "alone", tmp_path / "run")


# Over one another.


class Meanwhile(Reporter):
    """Does something after the first step."""

    def __init__(self, act) -> None:
        self.act = act

    def stepped(self, step: Step) -> None:
        if step.step == 1:
            self.act()


def test_a_run_that_is_training_is_not_overwritten(recipe: Recipe) -> None:
    def overwrite() -> None:
        refused = pytest.raises(CheckpointError, match="another process trains in 'run'")
        with refused, claim.claimed(recipe, "run", overwrite=True, warn=no_warning):
            pass

    train(recipe, out="run", reporter=Meanwhile(overwrite))
    train(recipe, out="alone")
    runs.assert_same_bits(Path("alone"), Path("run"))
    train(recipe, out="run", overwrite=True)


def test_a_run_that_is_being_set_up_is_not_joined(recipe: Recipe) -> None:
    with claim.claimed(recipe, "run", overwrite=False, warn=no_warning):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="another process trains"):
                train(recipe, out="run", overwrite=overwrite)
    assert not Path("run").exists()


def test_a_recipe_that_is_wrong_leaves_no_directory(recipe: Recipe, tmp_path: Path) -> None:
    wrong = recipe.optimizer.model_copy(update={"options": {"no_such": 1}})
    recipe = recipe.model_copy(update={"optimizer": wrong})
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out in (None, "one/two/three", "empty"):
        with pytest.raises(RecipeError):
            train(recipe, out=out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_of_something_else_is_not_touched(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_text("mine")
    with pytest.raises(CheckpointError, match="is taken"):
        train(recipe, out="photos")
    with pytest.raises(CheckpointError, match="holds no run"):
        train(recipe, resume="photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1.png"]


# After a kill.


def test_a_killed_runs_lock_is_free_at_once(tmp_path: Path) -> None:
    """Its loader's workers live on for up to five seconds."""
    file = runs.written(tmp_path, "workers=1")
    step = ("treeify.training.trainer:Trainer", "_accumulate", 2, False)
    assert runs.killed(file, *step) == -signal.SIGKILL
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run", no_warning) as lock:
        assert lock.is_in_place()
    assert not (tmp_path / "run" / LOCK).exists()


def test_what_a_run_killed_in_its_set_up_leaves_is_free(recipe: Recipe) -> None:
    Path("run").mkdir()
    for name in (LOCK, ".recipe.yaml.123"):
        Path("run", name).touch()
    train(recipe, out="run", reporter=runs.InterruptAt(1))
    assert not [path for path in Path("run").iterdir() if path.name in (LOCK, ".recipe.yaml.123")]


def test_a_run_killed_between_its_first_two_files_goes_on(recipe: Recipe) -> None:
    Path("run").mkdir()
    Path("run", "recipe.yaml").write_text(dump_recipe(recipe))
    run = GridRun("tiny", 0, recipe, Path("run"))
    assert ablate([run])
    assert last_epoch(run) is not None
    assert RunDirectory(run.directory).environment().device == "cpu"


def test_a_forked_process_has_no_part_in_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with locked(tmp_path, no_warning) as lock:
        if not (child := os.fork()):
            os.close(writer)
            os.read(reader, 1)  # until the parent has closed it, or died
            os._exit(run_lock._descriptors != set() or lock.is_in_place())
    os.close(reader)
    with locked(tmp_path, no_warning):  # while the child is alive
        os.close(writer)
        assert os.waitpid(child, 0)[1] == 0


def test_a_lock_that_its_holder_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, the run that had it ends."""
    flock = run_lock.fcntl.flock
    ends = [lambda: (tmp_path / LOCK).unlink()]

    def late(descriptor: int, how: int) -> None:
        if ends:
            ends.pop()()
        flock(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", late)
    with locked(tmp_path, no_warning) as lock:
        assert lock.is_in_place()
        with pytest.raises(CheckpointError, match="another process"), locked(tmp_path, no_warning):
            pass


# Places.


def test_a_file_system_without_locks_is_warned_of(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    warnings: list[str] = []
    with claim.claimed(recipe, None, overwrite=False, warn=warnings.append):
        assert "has no locks (No locks available)" in warnings[0]


@pytest.mark.skipif(sys.platform != "linux", reason="nobody can write to /proc")
def test_a_place_that_cannot_be_written_to(recipe: Recipe) -> None:
    before = {*Path("/proc/self").iterdir()}
    places = {"/proc/self/run": "cannot be made", "/dev/null/run": "cannot be made"}
    names = {"null\0byte": "out is no path", "long" * 100: "out is no path"}
    for out, reason in {**places, **names}.items():
        with pytest.raises(CheckpointError, match=reason):
            train(recipe, out=out)
    assert {*Path("/proc/self").iterdir()} == before


def test_an_empty_directory_that_may_not_be_written_to(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    Path("run").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(CheckpointError, match=r"nothing can be written to 'run'.*Read-only"):
        train(recipe, out="run")


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(recipe: Recipe) -> None:
    Path("run").mkdir()
    Path("run", LOCK).symlink_to(Path("elsewhere").absolute())
    with pytest.raises(CheckpointError, match="nothing can be written to 'run'"):
        train(recipe, out="run")
    assert not Path("elsewhere").exists()


def test_a_directory_that_vanishes_while_training(recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match="'run' is not this run's any more"):
        train(recipe, out="run", reporter=Meanwhile(lambda: shutil.rmtree("run")))
    assert not Path("run").exists()


def test_a_directory_that_is_renamed_while_training(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "checkpoints.minutes=1e-9")
    train(recipe, out=tmp_path / "whole")

    def rename() -> None:
        if (tmp_path / "run" / "last").exists():  # in the second epoch
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(CheckpointError, match="is not this run's any more"):
        train(recipe, out=tmp_path / "run", reporter=Meanwhile(rename))
    assert not (tmp_path / "run").exists()
    train(recipe, resume=tmp_path / "moved")
    runs.assert_same_bits(tmp_path / "whole", tmp_path / "moved")


def test_a_directory_that_another_run_takes_over(recipe: Recipe) -> None:
    """`rm -r run`, and training anew under its name, while the first run goes on."""

    def take_over() -> None:
        shutil.rmtree("run")
        train(recipe.model_copy(update={"seed": 1}), out="run")

    with pytest.raises(CheckpointError, match="is not this run's any more"):
        train(recipe, out="run", reporter=Meanwhile(take_over))
    train(recipe.model_copy(update={"seed": 1}), out="alone")
    runs.assert_same_bits(Path("alone"), Path("run"))


# What trackers leave behind.


def test_a_tracker_that_nobody_asked_for_is_not_imported() -> None:
    """timm imports wandb, which makes directories that a killed process leaves."""
    # A process of its own: in this one, a test that asked for it may have been here before.
    code = (
        "import treeify.cli.predict, treeify.cli.eval, treeify.training.trainer, sys\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
