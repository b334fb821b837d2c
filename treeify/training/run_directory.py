"""The directory a training run leaves behind.

    recipe.yaml                   the recipe with every default filled in
    environment.json              versions, machine and commit
    metrics.jsonl                 one line per finished epoch
    treeify.lock                  while a process trains here
    checkpoints/
      step-00000360-epoch-0015/   an ensemble, as `treeify.load` reads it
        trainer.json              how far the run is, see `run_state`, ...
        trainer.safetensors       ... and the tensors of that
        ema/                      the averaged ensemble, if the recipe has a moving average
    last, best                    links to two of the checkpoints

`last` is the newest state, `best` the epoch with the highest held-out accuracy of all leaves:
chosen on the held-out images, so its own accuracy on them is a little flattering.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from treeify import files
from treeify.conversion import checkpoint, saving
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.saved_config import EMA, LAST, check_files, read_config
from treeify.errors import CheckpointError
from treeify.training import metrics_file, run_lock, state_file
from treeify.training.environment import Environment
from treeify.training.events import Epoch
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import dump_recipe, load_recipe
from treeify.training.run_lock import Lock

RECIPE, ENVIRONMENT, METRICS = "recipe.yaml", "environment.json", "metrics.jsonl"
STATES, BEST = "checkpoints", "best"
CHECKPOINTS = (LAST, BEST)
RUN_FILES = (RECIPE, ENVIRONMENT, METRICS, STATES, *CHECKPOINTS)

# Keys that may change when a run goes on: none of them changes the weights.
_FREE = ("out", "workers", "trackers", "checkpoints", "skip_corrupt")


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's ensemble, what `RunState.load_state_dict` reads, and the averaged ensemble."""

    hne: HierarchicalEnsemble
    state: dict[str, Any]
    ema: HierarchicalEnsemble | None


@dataclass(frozen=True)
class RunDirectory:
    """Writes and reads the files of one run, in a directory that exists.

    Args:
        path: of the directory.
        lock: of the process that trains there; without it, nothing may be written.
    """

    path: Path
    lock: Lock | None = None

    def describe(self, recipe: Recipe, device: torch.device) -> None:
        """Write what is run and where, in the place of an earlier run; other files stay."""
        text = json.dumps(asdict(Environment.of(device)), indent=2) + "\n"
        with self._writing():
            if is_run(self.path):
                # The two files below are replaced: killed on the way, this is still a run.
                for name in (*CHECKPOINTS, STATES, METRICS):
                    files.remove(self.path / name)
            files.replace_text(self.path / RECIPE, dump_recipe(recipe))
            files.replace_text(self.path / ENVIRONMENT, text)

    def write_recipe(self, recipe: Recipe) -> None:
        """Put another recipe in the place of the run's."""
        with self._writing():
            files.replace_text(self.path / RECIPE, dump_recipe(recipe))

    def environment(self) -> Environment:
        """What `describe` wrote; CheckpointError if it is damaged."""
        file = self.path / ENVIRONMENT
        try:
            return TypeAdapter(Environment).validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error

    def append_metrics(self, epoch: Epoch) -> None:
        """Add a line to `metrics.jsonl`."""
        with self._writing():
            files.append_line(self.path / METRICS, json.dumps(asdict(epoch)))

    def metrics(self) -> list[Epoch]:
        """The epochs in `metrics.jsonl` that can be read."""
        return [row.epoch for row in metrics_file.read_rows(self.path / METRICS)[0]]

    def epoch(self, number: int, levels: int) -> Epoch | None:
        """One epoch of a tree of so many levels; None if its line is lost."""
        epochs = [epoch for epoch in self.metrics() if epoch.epoch == number]
        fitting = [row for row in epochs if len(row.train) == len(row.held_out) == levels]
        return fitting[0] if fitting else None

    def save(
        self,
        hne: HierarchicalEnsemble,
        ema: HierarchicalEnsemble | None,
        state: Mapping[str, Any],
        *,
        keep: int,
    ) -> None:
        """Write a checkpoint, point `last` and `best` to theirs, and remove older ones.

        In this order, whenever the process is killed there is a checkpoint to go on from. The
        state is a `RunState`'s: `step` and `epochs` name the checkpoint, `best` names the best so
        far, which stays besides the newest `keep`.
        """

        def write(draft: Path) -> None:
            saving.save(hne, draft)
            if ema is not None:
                saving.save(ema, draft / EMA)
            state_file.write_state(draft, state)  # last: it has the checksums of all the others

        final = self.path / STATES / state_name(state["step"], state["epochs"])
        with self._writing():
            files.publish(final, write)
            self._point(final, state)
        # Last: until now the links named one of these.
        for old in self._states()[:-keep]:
            if old.name != state["best"]:
                # What cannot be removed, as a network file system keeps what others read, is
                # removed another time.
                shutil.rmtree(old, ignore_errors=True)

    def _point(self, path: Path, state: Mapping[str, Any]) -> None:
        files.point(self.path / LAST, path)
        if state["best"] is not None and (best := path.with_name(state["best"])).is_dir():
            files.point(self.path / BEST, best)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what keeps a file from being written into one message."""
        if self.lock is None or not self.lock.is_in_place():
            raise CheckpointError(
                f"run directory {str(self.path)!r} is not this run's any more.",
                expected=f"the directory, with {run_lock.LOCK}, in its place until the run ends",
                found="another one, or none: it was removed, renamed or replaced",
                next_step="If it is elsewhere now, go on with treeify train --resume DIRECTORY.",
            )
        try:
            yield
        except (OSError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error}",
                expected="room on the disk and the right to write",
                next_step=f"What was there is as it was. {self.describe_last()}",
            ) from error

    def _states(self) -> list[Path]:
        """Checkpoints, the oldest first."""
        return sorted((self.path / STATES).glob("step-*"))

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest undamaged state; None if nothing was saved yet. For one process only.

        Metrics written after it and what killed writers left behind are removed; what is damaged is
        renamed, and `warn` hears about it.

        Raises:
            CheckpointError: every state is damaged, or one cannot be read.
        """
        states = self._states()
        has_ema = load_recipe(self.path / RECIPE).ema is not None
        for folder, names in (
            (self.path, "|".join(map(re.escape, RUN_FILES))),
            (self.path / STATES, r"step-\d+-epoch-\d+"),
        ):
            for draft in files.drafts(folder, names):
                files.remove(draft)
        for path in reversed(states):
            try:
                state = _undamaged(path, has_ema=has_ema)
            except _DAMAGE as problem:  # noqa: PERF203 - a few states at most
                damaged = files.unused(path.with_name(f"damaged-{path.name}"))
                path.rename(damaged)
                warn(f"{path} is damaged, it is {damaged.name} now: {problem}")
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            else:
                # A process that was killed may have written it without pointing to it.
                with self._writing():
                    self._point(path, state)
                self._mend_metrics(state["epochs"], warn)
                return path
        if states:
            raise CheckpointError(
                f"every state of {self.path} is damaged.",
                found=", ".join(path.name for path in states),
                next_step="Begin another run: leave --resume out, or copy a state back.",
            )
        self._mend_metrics(0, warn)
        return None

    def _mend_metrics(self, epochs: int, warn: Callable[[str], None]) -> None:
        with self._writing():
            metrics_file.mend(self.path / METRICS, epochs, warn)

    def describe_last(self) -> str:
        """Where the run can go on from, for messages."""
        if not (self.path / LAST).exists():
            return "Nothing was saved yet."
        return (
            f"{str(self.path / LAST)!r} holds the last state; go on from it with"
            f" treeify train --resume {self.path}"
        )


def state_name(step: int, epochs: int) -> str:
    """The name of a checkpoint after so many steps and finished epochs."""
    return f"step-{step:08d}-epoch-{epochs:04d}"


def load_state(path: Path, recipe: Recipe) -> SavedState:
    """Read a checkpoint of a run that is gone on with.

    The function that builds the base model is trusted if the recipe names it, too: the user has
    asked to run that.
    """

    def load(ensemble: Path) -> HierarchicalEnsemble:
        architecture = read_config(ensemble)["architecture"]
        is_the_recipes = architecture is not None and architecture.get("name") == recipe.model.name
        return checkpoint.load(ensemble, trust=is_the_recipes)

    ema = load(path / EMA) if (path / EMA).is_dir() else None
    return SavedState(load(path), state_file.read_state(path), ema)


# What reading a damaged file raises; one that may not be read, say, raises something else.
_DAMAGE = (CheckpointError, FileNotFoundError, ValueError, SafetensorError)


def _undamaged(path: Path, *, has_ema: bool) -> dict[str, Any]:
    """The run's part of a checkpoint; raises one of `_DAMAGE` if any of its files is damaged."""
    for ensemble in (path, path / EMA) if has_ema else (path,):
        check_files(ensemble)
    return state_file.read_state(path)


def recipe_in(path: Path) -> Path:
    """The recipe file of a run; CheckpointError if the directory holds none."""
    if not (file := path / RECIPE).is_file():
        raise CheckpointError(
            f"{str(path)!r} holds no run.",
            expected=f"a directory with {RECIPE}, as treeify train makes it",
        )
    return file


def check_same(directory: RunDirectory, recipe: Recipe) -> None:
    """Raise CheckpointError unless a directory holds a run of this recipe."""
    file = recipe_in(directory.path)
    new, old = (_flat(each.model_dump()) for each in (recipe, load_recipe(file)))
    differing = {
        key: f"{key}: {new.get(key)!r}, the run has {old.get(key)!r}"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) and key.split(".")[0] not in _FREE
    }
    if differing:
        resume = f"treeify train --resume {directory.path}"
        longer = "schedule.epochs" in differing
        raise CheckpointError(
            f"{str(directory.path)!r} holds a run of another recipe.",
            expected="the same recipe and overrides as when it began",
            found="\n    ".join(differing.values()),
            next_step=f"Go on with it as it began: {resume}"
            + (f"; for longer: {resume} --more-epochs N" if longer else ""),
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their key paths, e.g. `optimizer.lr`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def is_run(path: Path) -> bool:
    """Whether a directory holds a run."""
    return all((path / name).is_file() for name in (RECIPE, ENVIRONMENT))
