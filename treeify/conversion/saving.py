"""Saving ensembles, so that whatever happens a directory holds the old or the new one whole.

Weights are written under a name that no other file has, then the configuration that names them,
in one moment. Until that moment the old configuration and the old weights are there.
"""

import re
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from treeify import files
from treeify.arguments import as_path
from treeify.conversion import checkpoint, checksums
from treeify.conversion.ensemble import (
    MEASUREMENTS,
    HierarchicalEnsemble,
    Measurements,
    require_ensemble,
)
from treeify.conversion.saved_config import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    WEIGHTS_NAME,
    opened,
    read_config,
    weights_in,
)
from treeify.data.preparation import PREPARATION, Preparation
from treeify.errors import CheckpointError
from treeify.models.fingerprint import fingerprint
from treeify.models.hub import is_remote
from treeify.models.saved_architecture import without_weights
from treeify.models.versions import MODEL_LIBRARIES, versions_of

# What killed writers of earlier versions left.
_OLD_DRAFT = re.compile(rf"({re.escape(WEIGHTS)}|{re.escape(CONFIG)})\.[0-9a-f]{{32}}")

_Value = TypeVar("_Value")


def save(hne: HierarchicalEnsemble, path: str | Path, *, overwrite: bool = False) -> None:
    """Write an ensemble to a directory that `treeify.load` reads.

    Until the new one is there whole, on the disk, the directory holds what it held. Files that are
    no ensemble's stay.

    Args:
        hne: the ensemble.
        path: a new or empty directory.
        overwrite: also write where the directory has files already.

    Raises:
        CheckpointError: the directory is not empty, or cannot be written, or `hne.preparation` is
            no plain data. InputError: `hne` is no ensemble.
    """
    require_ensemble(hne)
    path = as_path("path", path, CheckpointError)
    if is_remote(path):
        raise CheckpointError(
            f"{path} is a repository of the hub, and no directory.",
            expected="a directory",
            next_step="Save it in one, then push that: treeify.push(DIRECTORY, 'org/name').",
        )
    check_writable(path, overwrite=overwrite)
    is_new = not path.exists()
    identity = uuid.uuid4().hex
    config = {"identity": identity, **_config(hne)}
    with _writing(path, "It holds what it held, or the new ensemble: either of them whole."):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with files.locked(path):
                check_writable(path, overwrite=overwrite)  # others may have been here
                weights = _write_weights(hne, path, identity)
                _write_config(path, config, weights)
                with suppress(OSError):  # the ensemble is there; the next save tries again
                    _clear(path, weights)
        finally:
            if is_new and path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _write_weights(hne: HierarchicalEnsemble, path: Path, identity: str) -> Path:
    """Write the weights to a file of their own; it is returned."""
    tensors = {**checkpoint.untied(hne), **checkpoint.unlisted(hne)}
    file = path / WEIGHTS
    if file.exists():  # the configuration may name it
        file = file.with_stem(f"{file.stem}-{identity}")
    # The identity shows that weights and configuration belong together, where no checksum is read.
    files.replace_file(file, lambda draft: save_file(tensors, draft, {"identity": identity}))
    return file


def _write_config(path: Path, config: dict[str, Any], weights: Path) -> None:
    """Write a configuration that names the weights; if it cannot be, they are removed."""
    file = path / CONFIG
    sealed = {**config, checksums.FILES: checksums.checksums([weights], path)}
    try:
        files.replace_text(file, checksums.seal(sealed))
    except OSError:
        # It may have got its name, and the disk failed after that.
        if not file.is_file() or config["identity"] not in file.read_text("utf-8", "replace"):
            weights.unlink()
        raise


def _clear(path: Path, weights: Path) -> None:
    """Remove weights that no configuration names, and what killed writers left."""
    names = re.compile(rf"{WEIGHTS_NAME.pattern}|{_OLD_DRAFT.pattern}")
    others = [file for file in path.iterdir() if names.fullmatch(file.name) and file != weights]
    drafts = files.drafts(path, rf"{re.escape(CONFIG)}|{WEIGHTS_NAME.pattern}")
    for file in (*others, *drafts):
        if not file.is_dir():  # which would be somebody else's
            file.unlink()


def save_measurements(hne: HierarchicalEnsemble, path: str | Path) -> None:
    """Write what was measured (tunings, latencies, budgets) beside weights saved before.

    What others have measured and written since the ensemble was loaded stays.

    Args:
        hne: the ensemble that was saved there, or loaded from there.
        path: its directory.

    Raises:
        CheckpointError: the directory holds no ensemble with these weights, or cannot be written.
    """
    path = Path(path)
    read_config(path, trust=True)  # whoever loaded it has decided
    with _writing(path, "It is as it was."), files.locked(path):
        config = read_config(path, trust=True)
        _check_weights(hne, path, config)
        before = hne.saved_measurements.get(path.resolve())
        merged = _merged(checkpoint.measurements_in(path, config), before, hne.measurements)
        weights, checksum = weights_in(path, config)
        if checksum is None:  # an earlier version saved them; now they are known to be whole
            config |= {checksums.FILES: checksums.checksums([weights], path)}
        files.replace_text(path / CONFIG, checksums.seal({**config, **_dumped(merged)}))
    # Not what was merged: of this ensemble, what others measured was never removed.
    hne.saved_measurements[path.resolve()] = hne.measurements


def _check_weights(hne: HierarchicalEnsemble, path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError unless a checkpoint has the weights of an ensemble, bit by bit."""
    state = checkpoint.untied(hne)
    with opened(path, config, verify=False) as reader:
        names = reader.keys()
        saved = {name for name in names if not checkpoint.is_unlisted(name)}
        is_same = saved == state.keys() and all(
            _same_bits(reader.get_tensor(name), state[name]) for name in saved
        )
    if not is_same:
        raise CheckpointError(
            f"{path} holds another ensemble.",
            expected="the one that was measured, with the same weights",
            next_step="Load it, and measure again.",
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal, NaN to NaN too."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other)))


def _merged(theirs: Measurements, before: Measurements | None, ours: Measurements) -> Measurements:
    """What two have measured who read the same file.

    Args:
        theirs: what is in the file now.
        before: what this process had when it last read or wrote it; None if it never did.
        ours: what this process has now. What it did not change is theirs.
    """
    base = before or Measurements()

    def each(
        read: Callable[[Measurements], Iterable[_Value]], key: Callable[[_Value], Hashable]
    ) -> tuple[_Value, ...]:
        file, old, new = ({key(each): each for each in read(part)} for part in (theirs, base, ours))
        stays = {name: value for name, value in file.items() if name in new or name not in old}
        changed = {name: value for name, value in new.items() if value != old.get(name)}
        return tuple((new | stays | changed).values())

    is_changed = before is None or ours.execution != before.execution
    return Measurements(
        ours.execution if is_changed else theirs.execution,
        each(lambda part: part.tunings, lambda tuning: tuning.situation),
        each(lambda part: part.latencies, lambda latencies: latencies.situation),
        each(lambda part: part.budgets, lambda budget: budget.target_macs),
    )


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be written to `path`."""
    if not (overwrite and path.is_dir()):
        next_step = "Choose another one, or pass --overwrite (overwrite=True)."
        files.check_new(path, CheckpointError, next_step)


@contextmanager
def _writing(path: Path, outcome: str) -> Iterator[None]:
    """Turn what keeps a directory from being written into one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}", next_step=outcome) from error


def _config(hne: HierarchicalEnsemble) -> dict[str, Any]:
    architecture = hne.architecture
    return {
        "format": FORMAT,
        "treeify": version("treeify"),
        "versions": versions_of(*MODEL_LIBRARIES),
        "architecture": None if architecture is None else asdict(without_weights(architecture)),
        "fingerprint": fingerprint(hne.skeleton),
        "splits": list(hne.conversion.splits.specs),
        "example": list(hne.example),
        **({"batch": batch} if (batch := hne.traced.batch) > 1 else {}),
        **({"hooks": list(hooks)} if (hooks := hne.traced.changed_by_hooks) else {}),
        "frozen": sorted(key for key, tensor in hne.named_parameters() if not tensor.requires_grad),
        **({"evaluating": list(hne.evaluating)} if hne.evaluating else {}),
        **_preparation(hne),
        **_dumped(hne.measurements),
    }


def _preparation(hne: HierarchicalEnsemble) -> dict[str, Any]:
    if hne.preparation is None:
        return {}
    if not isinstance(hne.preparation, Preparation):
        raise CheckpointError(
            "hne.preparation cannot be saved.",
            expected="a treeify.data.Preparation, which is plain data",
            found=type(hne.preparation).__name__,
        )
    return {"preparation": PREPARATION.dump_python(hne.preparation, mode="json")}


def _dumped(measurements: Measurements) -> dict[str, Any]:
    """What was measured, as JSON values."""
    values: dict[str, Any] = MEASUREMENTS.dump_python(measurements, mode="json", by_alias=True)
    return values
