"""What a run depends on besides its recipe: versions, machine and commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from treeify.models.versions import MODEL_LIBRARIES, versions_of

PACKAGES = ("treeify", *MODEL_LIBRARIES, "accelerate", "numpy", "safetensors")


@dataclass(frozen=True)
class Environment:
    """Where and when (`started`, ISO 8601 in UTC) a run began, and treeify's commit.

    The versions are those of the packages that results depend on, None for one that was not
    installed; `threads` are PyTorch's.
    """

    started: str
    python: str
    platform: str
    cpus: int | None
    threads: int
    device: str
    gpu: str | None
    versions: dict[str, str | None]
    commit: str | None
    argv: list[str]

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        """The environment of a run that begins now on a device."""
        return cls(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            python=platform.python_version(),
            platform=platform.platform(),
            cpus=os.cpu_count(),
            threads=torch.get_num_threads(),
            device=str(device),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            versions={**versions_of(*PACKAGES)},
            commit=_commit(),
            argv=sys.argv,
        )


def _commit() -> str | None:
    """The commit this code was run from, `-dirty` if it was changed; None outside a repository."""
    file = Path(__file__)
    git = partial(subprocess.run, cwd=file.parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", file.name])  # not some repository around us
        return str(git(["git", "describe", "--always", "--dirty", "--abbrev=40"]).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None
