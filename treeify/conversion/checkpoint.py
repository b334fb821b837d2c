"""Saving and loading ensembles: weights as safetensors, everything else as JSON, never pickle."""

import copy
import json
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from treeify import files
from treeify.arguments import as_path
from treeify.conversion.assemble import assemble, blank_image
from treeify.conversion.ensemble import MEASUREMENTS, HierarchicalEnsemble, require_ensemble
from treeify.conversion.initialize import copies
from treeify.conversion.resolve import resolve
from treeify.data.preparation import PREPARATION, Preparation
from treeify.engine.packed_tensors import get_parent, get_tensor, named_tensors
from treeify.errors import CheckpointError, ModelError, TreeifyError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.rebuild import rebuild, without_weights
from treeify.models.recognise import recognise
from treeify.tracing.trace import plain_tensors
from treeify.versions import MODEL_LIBRARIES, versions_of

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# In a run's directory its newest ensemble, and in that one the average of its weights.
LAST, EMA = "last", "ema"
# Before the names of what no state dict has; no module's path has a space.
_BUFFER, _CONSTANT = "buffer ", "constant "


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
            no plain data. InputError: `hne` is no ensemble.
    """
    require_ensemble(hne)
    path = as_path("path", path, CheckpointError)
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
    config = read_config(path)
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


def load(path: str | Path, model: nn.Module | None = None) -> HierarchicalEnsemble:
    """Read an ensemble that `save` wrote.

    Args:
        path: the directory.
        model: the base model, where treeify cannot build it by itself (an ensemble made from a
            module of the user's own). Its weights do not matter, and it is not modified.

    Returns:
        The ensemble, in evaluation mode, on the CPU. Parameters that did not require gradients when
        it was saved do not now.

    Raises:
        CheckpointError: the directory is missing, damaged, of another format, or does not match its
            configuration.
    """
    path = as_path("path", path, CheckpointError)
    config = read_config(path)
    weights, identity = _read_weights(path / WEIGHTS)
    if identity != config["identity"]:
        raise CheckpointError(
            f"{path}: {WEIGHTS} and {CONFIG} come from different saves.",
            next_step="Save the ensemble again.",
        )
    base, architecture = _built(path, config) if model is None else resolve(model)
    try:
        base = _with_constants(base, weights)
        hne = assemble(
            base,
            architecture or recognise(base),
            config["splits"],
            copies(base),
            example_input=blank_image(base, config["example"], config.get("batch", 1)),
            saved=True,
        )
    except TreeifyError as error:
        versions = (f"{package} {number}" for package, number in config["versions"].items())
        raise CheckpointError(
            f"{path}: its base model no longer converts as recorded: {error}",
            expected=f"the versions it was saved with: {', '.join(versions)}",
        ) from error
    _check_fingerprint(path, config, hne)
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


def scored_ensemble(path: Path) -> Path:
    """The directory of the ensemble that a run's last scores are of, or of an ensemble itself.

    Args:
        path: a run, one of its checkpoints, or an ensemble.
    """
    path = path / LAST if (path / LAST).is_dir() else path
    return path / EMA if (path / EMA).is_dir() else path


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a checkpoint directory.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    file = path / CONFIG
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and no ensemble.",
            expected=f"a directory with {CONFIG} and {WEIGHTS}, written by treeify.save",
            next_step="Make an ensemble of the weights of a network:"
            f" treeify convert NAME --weights {path}",
        )
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no ensemble.",
            expected=f"a directory with {CONFIG} and {WEIGHTS}, written by treeify.save",
            found="no such directory" if not path.is_dir() else f"no {CONFIG}",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        name = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{file} is of another format.",
            expected=f"format {FORMAT} (treeify {version('treeify')})",
            found=f"format {name}",
            next_step="Load it with the treeify version that wrote it.",
        )
    keys = ("identity", "architecture", "fingerprint", "splits", "example", "versions")
    missing = [key for key in keys if key not in config]
    if missing:
        raise CheckpointError(f"{file} is incomplete.", expected=f"the keys {', '.join(missing)}")
    return config


def preparation_in(path: Path, config: Mapping[str, Any]) -> Preparation | None:
    """What a checkpoint's configuration says of images; None if nothing, as in earlier versions.

    Raises:
        CheckpointError: it is damaged.
    """
    if (values := config.get("preparation")) is None:
        return None
    try:
        return PREPARATION.validate_python(values)
    except (ValueError, TreeifyError) as error:
        raise CheckpointError(
            f"{path / CONFIG}: the preparation of images is damaged: {error}",
            next_step="Remove the key preparation; treeify predict then takes --mean and --std.",
        ) from error


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
    unlisted = {_CONSTANT + key: tensor for key, tensor in plain_tensors(hne.traced).items()}
    if hne.architecture is None or ":" in hne.architecture.name:
        listed = hne.state_dict().keys()
        buffers = {key: buffer for key, buffer in hne.named_buffers() if key not in listed}
        unlisted |= {_BUFFER + key: buffer for key, buffer in buffers.items()}
    # Copies: safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in unlisted.items()}


def _with_constants(base: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The base model with its plain tensors as they were, which are taken out of the weights."""
    names = [key for key in weights if key.startswith(_CONSTANT)]
    if not names:
        return base
    base = copy.deepcopy(base)
    for key in names:
        tensor = weights.pop(key)
        # A model without such a module is another one, which its fingerprint will tell.
        with suppress(AttributeError):
            parent, name = get_parent(base, key.removeprefix(_CONSTANT))
            setattr(parent, name, tensor)
    return base


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


def _built(path: Path, config: Mapping[str, Any]) -> tuple[nn.Module, Architecture]:
    """The base model and how it was built; its weights do not matter, and no file is read."""
    if config["architecture"] is None:
        raise CheckpointError(
            f"{path} was made from a module of the user's own, which treeify cannot build.",
            expected="that base model beside the directory",
            next_step="Load it with treeify.load(path, model=...), or convert it by name"
            " ('package.module:function') to have the name saved.",
        )
    architecture = without_weights(Architecture.from_dict(config["architecture"]))
    try:
        expected = config["fingerprint"] if _is_comparable(config) else None
        return rebuild(architecture, expected), architecture
    except ModelError as error:
        raise CheckpointError(
            f"{path} holds all weights, but its architecture {str(architecture)!r} cannot be built"
            f" here: {error}",
            next_step="Install or put on PYTHONPATH what builds it, or give the base model:"
            " treeify.load(path, model=...).",
        ) from error


def _is_comparable(config: Mapping[str, Any]) -> bool:
    """Whether fingerprints are: under the same versions of the libraries."""
    return bool(config["versions"] == versions_of(*MODEL_LIBRARIES))


def _check_fingerprint(path: Path, config: Mapping[str, Any], hne: HierarchicalEnsemble) -> None:
    # Under other versions shapes decide.
    if _is_comparable(config) and config["fingerprint"] != fingerprint(hne.skeleton):
        raise CheckpointError(
            f"{path}: the base model differs from the one that was saved.",
            expected="the same layers, widths and options",
            found=f"{type(hne.skeleton).__name__} built from {hne.architecture or 'model='}",
        )


@torch.no_grad()
def _fill(path: Path, hne: HierarchicalEnsemble, weights: dict[str, Tensor]) -> None:
    """Put saved tensors in the places of an ensemble's own."""
    buffers = dict(hne.named_buffers())
    for key in [key for key in weights if key.startswith(_BUFFER)]:
        tensor = weights.pop(key).clone()
        if (buffer := buffers.get(key.removeprefix(_BUFFER))) is not None:
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
        if packed.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: the weights do not match the configuration.",
                expected=f"{key!r} of shape {tuple(packed.shape)}",
                found=f"shape {tuple(tensor.shape)}",
            )
        # A copy: what safetensors returns is mapped from the file, which may be replaced later.
        packed.data = tensor.clone()
