"""The directory a training run leaves behind.

    recipe.yaml        the recipe with every default filled in
    environment.json   versions, machine and commit
    metrics.jsonl      one line per finished epoch
    checkpoints/       step-00000360, ...: ensembles `treeify.load` reads, with the trainer's state
                       beside them (`trainer.json`, `trainer.safetensors`) and, if the recipe has a
                       moving average, the averaged ensemble in `ema/`
    last, best         links to two of them

`last` is the newest state, `best` the epoch with the highest held-out accuracy of all leaves:
chosen on the held-out images, so its own accuracy on them is a little flattering.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from treeify import checkpoint, snapshot
from treeify.ensemble import HierarchicalEnsemble
from treeify.errors import CheckpointError
from treeify.recipe import Recipe
from treeify.recipe_file import dump_recipe, load_recipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECIPE, METRICS, STATES = "recipe.yaml", "metrics.jsonl", "checkpoints"
LAST, BEST, EMA = "last", "best", "ema"
CHECKPOINTS = (LAST, BEST)
RUN_FILES = (RECIPE, "environment.json", METRICS, STATES, *CHECKPOINTS)
PACKAGES = ("treeify", "torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")

# What a run may go on with otherwise than it began; none of it changes the weights.
_FREE = ("out", "workers", "trackers", "checkpoints", "skip_corrupt")


@dataclass(frozen=True)
class Saved:
    """A state of a run.

    Args:
        hne: the ensemble as it was.
        state: the trainer's, see `treeify.trainer`.
        ema: the averaged ensemble, if there is one.
    """

    hne: HierarchicalEnsemble
    state: dict[str, Any]
    ema: HierarchicalEnsemble | None


@dataclass(frozen=True)
class RunDirectory:
    """Writes and reads the files of one run.

    Args:
        path: an existing directory without files of another run.
    """

    path: Path

    def describe(self, recipe: Recipe, device: torch.device) -> None:
        """Write what is run and where."""
        snapshot.replace_text(self.path / RECIPE, dump_recipe(recipe))
        text = json.dumps(environment(device), indent=2) + "\n"
        snapshot.replace_text(self.path / "environment.json", text)

    def append_metrics(self, epoch: DataclassInstance) -> None:
        """Add a line to `metrics.jsonl`."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(epoch)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that was cut off is not among them."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found: list[dict[str, Any]] = []
        with contextlib.suppress(ValueError):
            found.extend(map(json.loads, lines))
        return found

    def save(
        self,
        step: int,
        hne: HierarchicalEnsemble,
        ema: HierarchicalEnsemble | None,
        state: Mapping[str, Any],
        *,
        best: bool,
        keep: int,
    ) -> None:
        """Write a checkpoint whole, point `last` (and `best`) to it, and remove older ones.

        Args:
            step: names it.
            hne: the ensemble.
            ema: the averaged ensemble.
            state: the trainer's.
            best: it is the best so far.
            keep: how many of the newest stay, besides the best.

        Raises:
            CheckpointError: it cannot be written; the earlier ones are as they were.
        """

        def write(draft: Path) -> None:
            checkpoint.save(hne, draft, overwrite=True)
            snapshot.write_state(draft, state)
            if ema is not None:
                checkpoint.save(ema, draft / EMA)

        final = self.path / STATES / f"step-{step:08d}"
        snapshot.publish(final, write)
        snapshot.point(self.path / LAST, final)
        if best:
            snapshot.point(self.path / BEST, final)
        for old in self._states()[:-keep]:
            if old.name != (self.path / BEST).resolve().name:
                shutil.rmtree(old)

    def _states(self) -> list[Path]:
        """Checkpoints, the oldest first."""
        return sorted((self.path / STATES).glob("step-*"))

    def newest(self, warn: Callable[[str], None]) -> Saved | None:
        """The newest whole state; None if there is none.

        Metrics written after it are removed, drafts too; damaged states are renamed.

        Args:
            warn: told about states that are damaged.
        """
        for draft in (*self.path.glob(".*"), *(self.path / STATES).glob(".*")):
            _remove(draft)
        saved = None
        for path in reversed(self._states()):
            if (saved := _read(path, warn)) is not None:
                snapshot.point(self.path / LAST, path)
                break
            path.rename(path.with_name(f"damaged-{path.name}"))
        done = 0 if saved is None else saved.state["epochs"]
        rows = [json.dumps(row) + "\n" for row in self.metrics() if row["epoch"] <= done]
        snapshot.replace_text(self.path / METRICS, "".join(rows))
        return saved

    def describe_last(self) -> str:
        """Where the run can go on from, for messages."""
        if not (self.path / LAST).exists():
            return "Nothing was saved yet."
        return (
            f"{str(self.path / LAST)!r} holds the last state; go on from it with"
            f" treeify train {self.path / RECIPE} --resume {self.path}"
        )


def _read(path: Path, warn: Callable[[str], None]) -> Saved | None:
    """A state; None, with a warning, if it is damaged."""
    ensembles = [path, *([path / EMA] if (path / EMA).is_dir() else [])]
    try:
        state = snapshot.read_state(path)
        for ensemble in ensembles:
            checkpoint.read_config(ensemble)
            with safe_open(ensemble / checkpoint.WEIGHTS, "pt"):  # it notices what is cut off
                pass
    except (CheckpointError, OSError, SafetensorError) as error:
        warn(f"{path} is damaged and put aside; the run goes on from the state before it.\n{error}")
        return None
    # Whatever else keeps it from being loaded is no damage.
    hne, *ema = map(checkpoint.load, ensembles)
    return Saved(hne, state, ema[0] if ema else None)


def check_same(directory: RunDirectory, recipe: Recipe) -> None:
    """Raise unless a directory holds a run of this recipe.

    Raises:
        CheckpointError: it holds no run.
        RecipeError: the run's recipe cannot be read.
    """
    file = directory.path / RECIPE
    if not file.is_file():
        raise CheckpointError(
            f"{str(directory.path)!r} holds no run.",
            expected=f"a directory with {RECIPE}, as treeify train makes it",
        )
    own, other = (_flat(found.model_dump()) for found in (recipe, load_recipe(file)))
    differing = [
        f"{key}: {own.get(key)!r}, the run has {other.get(key)!r}"
        for key in sorted(own.keys() | other.keys())
        if own.get(key) != other.get(key) and key.split(".")[0] not in _FREE
    ]
    if differing:
        raise CheckpointError(
            f"{str(directory.path)!r} holds a run of another recipe.",
            expected="the same recipe and overrides as when it began",
            found="\n    ".join(differing),
            next_step=f"Go on with it as it began: treeify train {file} --resume {directory.path}",
        )


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{above}{key}.") if inner else {f"{above}{key}": value}
    return found


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError unless a run may be written to `path`."""
    if path.is_dir() and (overwrite or not any(path.iterdir())):
        return
    if path.exists():
        raise CheckpointError(
            f"run directory {str(path)!r} is taken.",
            expected="a directory that is new or empty",
            next_step="Give another --out, or --overwrite to replace the run in it.",
        )


def replaced_run(path: Path) -> RunDirectory:
    """The directory, made if need be, without an earlier run's files; other files stay."""
    path.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        _remove(path / name)
    return RunDirectory(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def new_run(name: str) -> RunDirectory:
    """`runs/NAME`, or the first of `runs/NAME-2`, `runs/NAME-3`, ... that is not there yet."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    path = next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    path.mkdir(parents=True)
    return RunDirectory(path)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run depends on besides its recipe, ready for JSON."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        "argv": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this code was run from, `-dirty` if it was changed; None outside a repository."""
    here = Path(__file__)
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", here.name])  # not some repository around us
        return str(git(["git", "describe", "--always", "--dirty", "--abbrev=40"]).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None
