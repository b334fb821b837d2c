"""Loading ensembles: weights from safetensors, everything else from JSON, never pickle."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from treeify.arguments import as_path
from treeify.conversion.config_values import check_dtype, check_leaves
from treeify.conversion.ensemble import MEASUREMENTS, HierarchicalEnsemble, Measurements
from treeify.conversion.restore import CONSTANT, architecture_in, memory_limit, restored
from treeify.conversion.saved_config import (
    CONFIG,
    opened,
    preparation_in,
    read_config,
    weights_in,
)
from treeify.engine.packed_tensors import get_tensor, named_tensors
from treeify.errors import CheckpointError, TreeifyError
from treeify.models.hub import local_path
from treeify.tracing.trace import plain_tensors

# Before the names of buffers that no state dict has; no module's path has a space.
_BUFFER = "buffer "


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    trust: bool = False,
    verify: bool = True,
) -> HierarchicalEnsemble:
    """Read an ensemble that `save` wrote, without running anything that its files name.

    Args:
        path: the directory; or `hf-hub:org/name@revision`, a repository that `treeify push` wrote.
        model: the base model, where treeify cannot build it by itself (an ensemble made from a
            module of the user's own). Its weights do not matter, and it is not modified.
        trust: whether a function of whoever wrote the directory (`package.module:function`) may be
            imported and called, and links may lead out of it. Models of timm, torchvision and
            `treeify.models` need no trust. See docs/safety.md.
        verify: whether both files must be, bit by bit, what was saved. Earlier versions did not
            write what tells it.

    Returns:
        The ensemble, in evaluation mode, on the CPU. Parameters that did not require gradients when
        it was saved do not now.

    Raises:
        CheckpointError: the directory is missing, damaged, of another format, of another model, or
            names a function that is not trusted; or the repository cannot be had.
    """
    return _loaded(
        local_path(as_path("path", path, CheckpointError)), model, trust=trust, verify=verify
    )


def _loaded(
    path: Path, model: nn.Module | None, *, trust: bool, verify: bool
) -> HierarchicalEnsemble:
    """An ensemble, read again where another process saves one over it meanwhile."""
    while True:
        config = read_config(path, trust=trust, verify=verify)
        file, _ = weights_in(path, config)
        try:
            with opened(path, config, verify=verify, trust=trust) as reader:
                names = reader.keys()
                weights = {name: reader.get_tensor(name) for name in names}
                return _built(path, config, weights, model, trust=trust)
        except (CheckpointError, OSError, SafetensorError) as error:
            if read_config(path, trust=trust, verify=verify)["identity"] != config["identity"]:
                continue
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{file} is missing, truncated or damaged: {error}",
                next_step="Copy it again from where it was saved.",
            ) from error


def _built(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    model: nn.Module | None,
    *,
    trust: bool,
) -> HierarchicalEnsemble:
    """The ensemble of a checkpoint's configuration and weights."""
    check_leaves(path, config["splits"], weights)
    architecture = None if model is not None else architecture_in(path, config, trust=trust)
    limit = nullcontext() if trust else memory_limit(path, config, weights)
    hne = restored(path, config, weights, architecture, model, limit)
    _fill(path, hne, weights)
    if (frozen := config.get("frozen")) is not None:  # earlier saves have none
        for key, parameter in hne.named_parameters():
            parameter.requires_grad_(key not in frozen)
    hne.keep_evaluating(dict(hne.named_modules()).keys() & config.get("evaluating", ()))
    hne.preparation = preparation_in(path, config)
    # Last: a memory format that was tuned is given to tensors that are there.
    hne.measurements = hne.saved_measurements[path.resolve()] = measurements_in(path, config)
    return hne.eval()


def measurements_in(path: Path, config: Mapping[str, Any]) -> Measurements:
    """What a checkpoint's configuration says was measured; CheckpointError if that is damaged."""
    try:
        return MEASUREMENTS.validate_python(config)
    except (KeyError, TypeError, ValueError, TreeifyError) as error:
        raise CheckpointError(
            f"{path / CONFIG}: the measurements are damaged: {error!r}",
            next_step="Remove the keys execution, tunings, latencies and budgets, save what"
            " treeify.load(path, verify=False) gives, and measure again (treeify calibrate).",
        ) from error


def untied(hne: HierarchicalEnsemble) -> dict[str, Tensor]:
    """The state with each tied tensor once, under its first name."""
    packed = dict(named_tensors(hne))
    names: dict[int, str] = {}
    for key in hne.state_dict():
        if key in packed:  # unlike the extra state of a module, which is as it was built
            names.setdefault(id(packed[key]), key)
    # safetensors stores a dense row-major tensor, whatever memory format it computes in.
    return {key: packed[key].detach().cpu().contiguous() for key in names.values()}


def unlisted(hne: HierarchicalEnsemble) -> dict[str, Tensor]:
    """What no state dict has, and no builder makes again.

    Of a model of the user's own, buffers that are not persistent; and attributes that are tensors,
    but no parameters and no buffers. The user may have drawn them.
    """
    tensors = {CONSTANT + key: tensor for key, tensor in plain_tensors(hne.traced).items()}
    if hne.architecture is None or ":" in hne.architecture.name:
        listed = hne.state_dict().keys()
        buffers = {key: buffer for key, buffer in hne.named_buffers() if key not in listed}
        tensors |= {_BUFFER + key: buffer for key, buffer in buffers.items()}
    # Copies: safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def is_unlisted(name: str) -> bool:
    """Whether a saved tensor is one of `unlisted`."""
    return name.startswith((_BUFFER, CONSTANT))


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
    state = untied(hne)
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
    if tensor.shape != place.shape:
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"{key!r} of shape {tuple(place.shape)}",
            found=f"shape {tuple(tensor.shape)}",
        )
    check_dtype(path, key, place, tensor)
