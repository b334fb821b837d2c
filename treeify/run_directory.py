"""The directory a training run leaves behind.

    recipe.yaml        the recipe with every default filled in
    environment.json   versions, machine and commit
    metrics.jsonl      one line per finished epoch
    last/ best/        ensembles `treeify.load` reads, with the trainer's state beside them in
                       `optimizer.safetensors` (momentum, random generators) and `trainer.json`

`last` is the newest state, `best` the epoch with the highest held-out accuracy of all leaves:
chosen on the held-out images, so its own accuracy on them is a little flattering.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from treeify import checkpoint
from treeify.ensemble import HierarchicalEnsemble
from treeify.errors import CheckpointError
from treeify.recipe import Recipe, dump_recipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHECKPOINTS = ("last", "best")
RUN_FILES = ("recipe.yaml", "environment.json", "metrics.jsonl", *CHECKPOINTS)
PACKAGES = ("treeify", "torch", "torchvision", "timm", "numpy", "safetensors", "pydantic")


@dataclass(frozen=True)
class RunDirectory:
    """Writes the files of one run.

    Args:
        path: an existing directory without files of another run.
    """

    path: Path

    def describe(self, recipe: Recipe, device: torch.device) -> None:
        """Write what is run and where."""
        (self.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        _write_json(self.path / "environment.json", environment(device))

    def append_metrics(self, epoch: DataclassInstance) -> None:
        """Add a line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(epoch)) + "\n")

    def save(
        self,
        name: Literal["last", "best"],
        hne: HierarchicalEnsemble,
        tensors: Mapping[str, Tensor],
        counters: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint beside the old one, then swap: at any time one of the two is whole.

        Args:
            name: which checkpoint.
            hne: the ensemble.
            tensors: the trainer's state that is tensors.
            counters: the trainer's state that is numbers.
        """
        final, new, old = (self.path / f"{name}{suffix}" for suffix in ("", ".new", ".old"))
        checkpoint.save(hne, new, overwrite=True)
        save_file(dict(tensors), new / "optimizer.safetensors")
        _write_json(new / "trainer.json", counters)
        if final.exists():
            final.rename(old)
        new.rename(final)
        if old.exists():
            shutil.rmtree(old)


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
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
    return RunDirectory(path)


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


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
