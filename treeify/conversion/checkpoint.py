"""Saving and loading ensembles: weights as safetensors, everything else as JSON, never pickle."""

import json
import shutil
import uuid
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from treeify import files
from treeify.conversion.ensemble import MEASUREMENTS, HierarchicalEnsemble
from treeify.conversion.restore import CONSTANT, architecture_in, memory_limit, restored
from treeify.conversion.saved_config import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    check_weights_file,
    preparation_in,
    read_config,
)
from treeify.data.preparation import PREPARATION, Preparation
from treeify.engine.packed_tensors import get_tensor, named_tensors
from treeify.errors import CheckpointError, TreeifyError
from treeify.models.fingerprint import fingerprint
from treeify.models.saved_architecture import without_weights
from treeify.tracing.trace import plain_tensors
from treeify.versions import MODEL_LIBRARIES, versions_of

# Before the names of buffers that no state dict has; no module's path has a space.
_BUFFER = "buffer "


def save(hne: HierarchicalEnsemble, path: str | Path, *, overwrite: bool = False) -> None:
    """Write an ensemble to a directory that `load` reads.

    Each file is complete before it takes its final name, so an interrupted save never damages an
    earlier one. Other files in the directory stay.

    Args:
        hne: the ensemble.
        path: a new or empty directory.
        overwrite: also write where the directory has files already.

    Raises:
        CheckpointError: the directory is not empty, or cannot be written, or `hne.preparation` is
            no plain data.
    """
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    identity = uuid.uuid4().hex
    is_new = not path.exists()
    # Both files carry the identity: should the process die between the two renames, `load` sees
    # that weights and configuration are of different saves.
    drafts = [path / f"{name}.{identity}" for name in (WEIGHTS, CONFIG)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file({**_untied(hne), **_unlisted(hne)}, drafts[0], metadata={"identity": identity})
        config = {"identity": identity, **_config(hne)}
        drafts[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(drafts[1], drafts[0])  # safetensors lets nobody else read its files
        for draft, name in zip(drafts, (WEIGHTS, CONFIG), strict=True):
            draft.replace(path / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}", next_step="Nothing was saved there."
        ) from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        if is_new and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def save_measurements(hne: HierarchicalEnsemble, path: str | Path) -> None:
    """Write what was measured (tunings, latencies, budgets) beside weights saved before.

    Args:
        hne: the ensemble that was saved there, or loaded from there.
        path: its directory.

    Raises:
        CheckpointError: the directory holds no such ensemble, or cannot be written.
    """
    path = Path(path)
    config = read_config(path, trust=True)  # whoever loaded it has decided
    measured = _config(hne)
    if any(config[key] != measured[key] for key in ("fingerprint", "splits")):
        raise CheckpointError(
            f"{path} holds another ensemble.", expected="the one that was measured"
        )
    text = json.dumps({**config, **_measurements(hne)}, indent=2) + "\n"
    try:
        files.replace_text(path / CONFIG, text)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}", next_step="It is as it was."
        ) from error


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be written to `path`."""
    exists = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not exists.is_dir():
        raise CheckpointError(f"{exists} is a file.", expected="a directory, new or empty")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{path} is not empty.",
            expected="a new or empty directory",
            next_step="Choose another one, or pass --overwrite (overwrite=True).",
        )


def load(
    path: str | Path, model: nn.Module | None = None, *, trust: bool = False
) -> HierarchicalEnsemble:
    """Read an ensemble that `save` wrote, without running anything that its files name.

    Args:
        path: the directory.
        model: the base model, where treeify cannot build it by itself (an ensemble made from a
            module of the user's own). Its weights do not matter, and it is not modified.
        trust: whether a function of whoever wrote the directory (`package.module:function`) may be
            imported and called, and links may lead out of it. Models of timm, torchvision and
            `treeify.models` need no trust. See docs/safety.md.

    Returns:
        The ensemble, in evaluation mode, on the CPU. Parameters that did not require gradients when
        it was saved do not now.

    Raises:
        CheckpointError: the directory is missing, damaged, of another format, does not match its
            configuration, or names a function that is not trusted.
    """
    path = Path(path)
    config = read_config(path, trust=trust)
    architecture = None if model is not None else architecture_in(path, config, trust=trust)
    check_weights_file(path / WEIGHTS, trust=trust)
    weights, identity = _read_weights(path / WEIGHTS)
    if identity != config["identity"]:
        raise CheckpointError(
            f"{path}: {WEIGHTS} and {CONFIG} come from different saves.",
            next_step="Save the ensemble again.",
        )
    limit = nullcontext() if trust else memory_limit(path, config, weights)
    hne = restored(path, config, weights, architecture, model, limit)
    _fill(path, hne, weights)
    if (frozen := config.get("frozen")) is not None:  # earlier saves have none
        for key, parameter in hne.named_parameters():
            parameter.requires_grad_(key not in frozen)
    hne.preparation = preparation_in(path, config)
    # Last: a memory format that was tuned is given to tensors that are there.
    try:
        hne.measurements = MEASUREMENTS.validate_python(config)
    except (KeyError, TypeError, ValueError, TreeifyError) as error:
        raise CheckpointError(
            f"{path / CONFIG}: the measurements are damaged: {error!r}",
            next_step="Remove the keys execution, tunings, latencies and budgets, and measure again"
            " (treeify calibrate).",
        ) from error
    return hne.eval()


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
        "frozen": sorted(
            key for key, parameter in hne.named_parameters() if not parameter.requires_grad
        ),
        **_preparation(hne),
        **_measurements(hne),
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


def _measurements(hne: HierarchicalEnsemble) -> dict[str, Any]:
    """What was measured, as JSON values."""
    values: dict[str, Any] = MEASUREMENTS.dump_python(hne.measurements, mode="json", by_alias=True)
    return values


def _untied(hne: HierarchicalEnsemble) -> dict[str, Tensor]:
    """The state with each tied tensor once, under its first name."""
    packed = dict(named_tensors(hne))
    names: dict[int, str] = {}
    for key in hne.state_dict():
        if key in packed:  # unlike the extra state of a module, which is as it was built
            names.setdefault(id(packed[key]), key)
    # safetensors stores a dense row-major tensor, whatever memory format it computes in.
    return {key: packed[key].detach().cpu().contiguous() for key in names.values()}


def _unlisted(hne: HierarchicalEnsemble) -> dict[str, Tensor]:
    """What no state dict has, and no builder makes again.

    Of a model of the user's own, buffers that are not persistent; and attributes that are tensors,
    but no parameters and no buffers. The user may have drawn them.
    """
    unlisted = {CONSTANT + key: tensor for key, tensor in plain_tensors(hne.traced).items()}
    if hne.architecture is None or ":" in hne.architecture.name:
        listed = hne.state_dict().keys()
        buffers = {key: buffer for key, buffer in hne.named_buffers() if key not in listed}
        unlisted |= {_BUFFER + key: buffer for key, buffer in buffers.items()}
    # Copies: safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in unlisted.items()}


def _read_weights(file: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(file, framework="pt") as reader:
            names = reader.keys()
            metadata = reader.metadata() or {}
            return {name: reader.get_tensor(name) for name in names}, metadata.get("identity")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is missing, truncated or damaged: {error}",
            next_step="Copy it again from where it was saved.",
        ) from error


@torch.no_grad()
def _fill(path: Path, hne: HierarchicalEnsemble, weights: dict[str, Tensor]) -> None:
    """Put saved tensors in the places of an ensemble's own."""
    buffers = dict(hne.named_buffers())
    for key in [key for key in weights if key.startswith(_BUFFER)]:
        tensor = weights.pop(key).clone()
        buffer = buffers.get(key.removeprefix(_BUFFER))
        if buffer is not None:
            _require_fit(path, key, tensor, buffer)
            buffer.data = tensor
    state = _untied(hne)
    for key in sorted(state.keys() ^ weights.keys()):
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"a tensor {key!r}" if key in state else f"no tensor {key!r}",
            found=f"{len(weights)} tensors where the model has {len(state)}",
        )
    for key, tensor in weights.items():
        packed = get_tensor(hne, key)
        _require_fit(path, key, tensor, packed)
        # A copy: what safetensors returns is mapped from the file, which may be replaced later.
        packed.data = tensor.clone()


def _require_fit(path: Path, key: str, tensor: Tensor, place: Tensor) -> None:
    """Raise CheckpointError unless a saved tensor is one of this place, in whatever precision."""
    kinds = {each.dtype.is_floating_point or each.dtype for each in (tensor, place)}
    if tensor.shape != place.shape or len(kinds) > 1:
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"{key!r} of shape {tuple(place.shape)}, {place.dtype}",
            found=f"shape {tuple(tensor.shape)}, {tensor.dtype}",
        )
