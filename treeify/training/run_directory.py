"""The directory a training run leaves behind.

    recipe.yaml                   the recipe with every default filled in
    environment.json              versions, machine and commit
    metrics.jsonl                 one line per finished epoch
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
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from treeify import files
from treeify.arguments import as_path
from treeify.conversion import checkpoint
from treeify.conversion.checkpoint import EMA, LAST
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.errors import CheckpointError
from treeify.training import state_file
from treeify.training.environment import Environment
from treeify.training.events import EPOCH, Epoch
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import dump_recipe, load_recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
    """Writes and reads the files of one run, in a directory that exists."""

    path: Path

    def describe(self, recipe: Recipe, device: torch.device) -> None:
        """Write what is run and where."""
        text = json.dumps(asdict(Environment.of(device)), indent=2) + "\n"
        with self._writing():
            files.replace_text(self.path / RECIPE, dump_recipe(recipe))
            files.replace_text(self.path / ENVIRONMENT, text)

    def write_recipe(self, recipe: Recipe) -> None:
        """Put another recipe in the place of the run's."""
        with self._writing():
            files.replace_text(self.path / RECIPE, dump_recipe(recipe))

    def environment(self) -> Environment:
        """What `describe` wrote."""
        text = (self.path / ENVIRONMENT).read_text(encoding="utf-8")
        return TypeAdapter(Environment).validate_json(text)

    def append_metrics(self, epoch: Epoch) -> None:
        """Add a line to `metrics.jsonl`."""
        with self._writing():
            files.append_line(self.path / METRICS, json.dumps(asdict(epoch)))

    def metrics(self) -> list[Epoch]:
        """The lines of `metrics.jsonl`; one that was cut off is not among them."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        epochs: list[Epoch] = []
        with contextlib.suppress(json.JSONDecodeError):
            epochs.extend(EPOCH.validate_python(json.loads(line)) for line in lines)
        return epochs

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
            checkpoint.save(hne, draft, overwrite=True)
            state_file.write_state(draft, state)
            if ema is not None:
                checkpoint.save(ema, draft / EMA)

        final = self.path / STATES / state_name(state["step"], state["epochs"])
        with self._writing():
            files.publish(final, write)
            self._point(final, state)
        # Last: until now the links named one of these.
        for old in self._states()[:-keep]:
            if old.name != state["best"]:
                shutil.rmtree(old)

    def _point(self, path: Path, state: Mapping[str, Any]) -> None:
        files.point(self.path / LAST, path)
        if state["best"] is not None and (best := path.with_name(state["best"])).is_dir():
            files.point(self.path / BEST, best)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what keeps a file from being written into one message."""
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

        Metrics written after it and what killed writers left behind are removed; damaged states are
        renamed, and `warn` hears about them.

        Raises:
            CheckpointError: every state is damaged, or one cannot be read.
        """
        states = self._states()
        for folder, names in (
            (self.path, "|".join(map(re.escape, RUN_FILES))),
            (self.path / STATES, r"step-\d+-epoch-\d+"),
        ):
            for draft in files.drafts(folder, names):
                files.remove(draft)
        for path in reversed(states):
            try:
                state = _undamaged(path)
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
                self._forget_after(state["epochs"])
                return path
        if states:
            raise CheckpointError(
                f"every state of {self.path} is damaged.",
                found=", ".join(path.name for path in states),
                next_step="Begin another run: leave --resume out, or copy a state back.",
            )
        self._forget_after(0)
        return None

    def _forget_after(self, epochs: int) -> None:
        """Remove metrics of epochs that the state to go on from has not finished."""
        rows = [json.dumps(asdict(row)) + "\n" for row in self.metrics() if row.epoch <= epochs]
        with self._writing():
            files.replace_text(self.path / METRICS, "".join(rows))

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


def load_state(path: Path) -> SavedState:
    """Read a checkpoint."""
    ema = checkpoint.load(path / EMA) if (path / EMA).is_dir() else None
    return SavedState(checkpoint.load(path), state_file.read_state(path), ema)


# What reading a damaged file raises; one that may not be read, say, raises something else.
_DAMAGE = (CheckpointError, FileNotFoundError, ValueError, SafetensorError)


def _undamaged(path: Path) -> dict[str, Any]:
    """The run's part of a checkpoint; raises one of `_DAMAGE` if any of its files is damaged."""
    for ensemble in [path, *([path / EMA] if (path / EMA).is_dir() else [])]:
        json.loads((ensemble / checkpoint.CONFIG).read_text(encoding="utf-8"))
        # Opening compares the length with the header's; nothing is read that loading reads again.
        with safe_open(ensemble / checkpoint.WEIGHTS, "pt"):
            pass
    return state_file.read_state(path)


@contextlib.contextmanager
def locked(directory: RunDirectory) -> Iterator[None]:
    """Keep other processes from training in the same directory; CheckpointError if one does."""
    if fcntl is None:  # Windows locks files by other means: nothing is checked
        yield
        return
    # The system gives up a lock when its process ends, even if killed: no run is locked for ever.
    with (directory.path / RECIPE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another process trains in {str(directory.path)!r}.",
                next_step="Wait for it or stop it, then try again.",
            ) from error
        yield


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


def free_path(recipe: Recipe, out: Path | str | None, *, overwrite: bool) -> Path:
    """Where a new run goes: `out`, else the recipe's, else `runs/NAME`, `runs/NAME-2`, ..."""
    out = out or recipe.out
    if out is None:
        return files.unused(Path("runs") / recipe.name)
    path = as_path("out", out, CheckpointError)
    is_directory = path.is_dir()
    is_free = not any(path.iterdir()) if is_directory else not path.exists()
    if not is_free and not (overwrite and is_directory):
        raise CheckpointError(
            f"run directory {str(path)!r} is taken.",
            expected="a directory that is new or empty",
            next_step="Give another --out, or --overwrite to replace the run in it.",
        )
    clashes = [name for name in RUN_FILES if (path / name).exists()]
    if clashes and not is_run(path):
        raise CheckpointError(
            f"{str(path)!r} holds no run, but files that a run would replace.",
            found=", ".join(clashes),
            next_step="Give another --out.",
        )
    return path


def is_run(path: Path) -> bool:
    """Whether a directory holds a run."""
    return all((path / name).is_file() for name in (RECIPE, ENVIRONMENT))


def create(path: Path) -> RunDirectory:
    """Create a run's directory, or remove an earlier run's files from it; other files stay.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"run directory {str(path)!r} cannot be made: {error}",
            next_step="Give another --out, or run elsewhere.",
        ) from error
    if is_run(path):
        for name in RUN_FILES:
            files.remove(path / name)
    return RunDirectory(path)
