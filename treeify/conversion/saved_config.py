"""The configuration of a saved ensemble, and where it lies, as somebody else may have written it.

Nothing that it names is imported, opened or called here, and no link is followed out of its folder.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open

from treeify import files
from treeify.conversion import checksums
from treeify.conversion.config_values import MOST_BYTES, MOST_VALUES, check_values
from treeify.data.preparation import PREPARATION, Preparation
from treeify.errors import CheckpointError, TreeifyError

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Names that files of weights have.
WEIGHTS_NAME = re.compile(r"model(-[0-9a-f]{32})?\.safetensors")
# In a run's directory its newest ensemble, and in that one the average of its weights.
LAST, EMA = "last", "ema"


def scored_ensemble(path: Path, *, trust: bool = False) -> Path:
    """The directory of the ensemble that a run's last scores are of, or of an ensemble itself.

    A link is followed here, once: a run that goes on may let it name another state at any time.

    Args:
        path: a run, one of its checkpoints, or an ensemble.
        trust: whether links may lead out of it.

    Raises:
        CheckpointError: one does.
    """
    inner = path / LAST if (path / LAST).is_dir() else path
    inner = inner.parent / inner.readlink() if inner.is_symlink() else inner
    inner = inner / EMA if (inner / EMA).is_dir() else inner
    if not trust:
        files.require_inside(inner, path)
    return inner


def read_config(path: Path, *, trust: bool = False, verify: bool = True) -> dict[str, Any]:
    """The configuration in a checkpoint directory.

    Args:
        path: the directory.
        trust: whether the file may be a link that leads out of it.
        verify: whether it must be, bit by bit, what was written.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or out of bounds.
    """
    file = path / CONFIG
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and no ensemble.",
            expected=f"a directory with {CONFIG} and {WEIGHTS}, written by treeify.save",
            next_step="Make an ensemble of the weights of a network:"
            f" treeify convert NAME --weights {path}",
        )
    if not file.exists():
        last = scored_ensemble(path, trust=True) if (path / LAST).is_dir() else None
        raise CheckpointError(
            f"{path} holds no ensemble.",
            expected=f"a directory with {CONFIG} and {WEIGHTS}, written by treeify.save",
            found="no such directory" if not path.is_dir() else f"no {CONFIG}",
            next_step=f"It is a run; its last ensemble is {last}." if last else None,
        )
    if not trust:
        files.require_inside(file, path)
    config = checksums.read_sealed(file, MOST_BYTES, verify=verify)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        name = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{file} is of another format.",
            expected=f"format {FORMAT} (treeify {version('treeify')})",
            found=f"format {name!s:.100}",
            next_step="Load it with the treeify version that wrote it.",
        )
    check_values(file, config)
    return config


def preparation_in(path: Path, config: Mapping[str, Any]) -> Preparation | None:
    """What a checkpoint's configuration says of images; None if nothing, as in earlier versions.

    Raises:
        CheckpointError: it is damaged.
    """
    if (values := config.get("preparation")) is None:
        return None
    try:
        preparation = PREPARATION.validate_python(values)
    except (ValueError, TreeifyError) as error:
        raise CheckpointError(
            f"{path / CONFIG}: the preparation of images is damaged: {error}",
            next_step="Remove the key preparation, and save what treeify.load(path, verify=False)"
            " gives; treeify predict then takes --mean and --std.",
        ) from error
    if prod(preparation.shape) > MOST_VALUES:
        raise CheckpointError(
            f"{path / CONFIG}: the size of images is too large.",
            expected=f"at most {MOST_VALUES:,} numbers",
            found=f"{preparation.shape}",
        )
    return preparation


def check_weights_file(file: Path, *, trust: bool = False) -> None:
    """Raise CheckpointError unless a file of weights can be read whole, and lies in its folder."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing, or no file.",
            next_step="Copy it again from where it was saved.",
        )
    if not trust:
        files.require_inside(file, file.parent)
    # A file with holes may say that it is as large as it likes.
    memory = psutil.virtual_memory().total
    if (size := file.stat().st_size) > memory:
        raise CheckpointError(
            f"{file} does not fit into memory.",
            expected=f"at most the {memory:,} bytes of this machine",
            found=f"{size:,} bytes",
        )


def weights_in(path: Path, config: Mapping[str, Any]) -> tuple[Path, str | None]:
    """Where a checkpoint's weights are, and their checksum; earlier versions wrote none.

    Raises:
        CheckpointError: the configuration does not say it as `treeify.save` does.
    """
    if checksums.FILES not in config:
        return path / WEIGHTS, None
    named = config[checksums.FILES]
    if isinstance(named, dict) and len(named) == 1:
        ((name, checksum),) = named.items()
        # No other names: the file is in the directory, whoever wrote the configuration.
        if WEIGHTS_NAME.fullmatch(name) and isinstance(checksum, str):
            return path / name, checksum
    raise CheckpointError(
        f"{path / CONFIG} does not name the weights.",
        expected=f"one file such as {WEIGHTS}, and its checksum",
        found=repr(named)[:200],
    )


@contextmanager
def opened(
    path: Path, config: Mapping[str, Any], *, verify: bool, trust: bool = True
) -> Iterator[Any]:
    """Open a checkpoint's weights, which must be those that its configuration is of.

    They are verified in a thread meanwhile: keep nothing of them before this ends.

    Yields:
        A reader of safetensors.

    Raises:
        CheckpointError: they are others, or, at the end, not what was written.
        OSError, SafetensorError: they are missing, truncated, or cannot be read.
    """
    file, checksum = weights_in(path, config)
    check_weights_file(file, trust=trust)
    known = checksum if verify else None
    check = nullcontext() if known is None else checksums.checking(file, known)
    # Opening compares the file's length with what its header says.
    with check, safe_open(file, framework="pt") as reader:
        if (reader.metadata() or {}).get("identity") != config["identity"]:
            raise CheckpointError(
                f"{path}: {file.name} and {CONFIG} come from different saves.",
                next_step="Save the ensemble again.",
            )
        yield reader


def check_files(path: Path) -> None:
    """Look whether the files of a checkpoint are what was written.

    Raises:
        CheckpointError, SafetensorError, FileNotFoundError: they are not.
        OSError: they cannot be read.
    """
    with opened(path, read_config(path, trust=True), verify=True):
        pass
