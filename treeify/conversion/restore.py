"""From a saved configuration to the ensemble it describes, before its weights are filled in."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from treeify.conversion.assemble import assemble, blank_image, trace_model
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import copies
from treeify.conversion.resolve import resolve
from treeify.conversion.saved_config import CONFIG
from treeify.conversion.splits import parse
from treeify.errors import CheckpointError, ModelError, TreeifyError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.memory_limit import MemoryLimit
from treeify.models.rebuild import rebuild
from treeify.models.recognise import recognise
from treeify.models.saved_architecture import saved_architecture
from treeify.models.versions import MODEL_LIBRARIES, versions_of
from treeify.tracing.hooks import require_hooks

# Before the names of tensors that are neither parameters nor buffers; no module's path has a space.
CONSTANT = "constant "


def architecture_in(path: Path, config: Mapping[str, Any], *, trust: bool) -> Architecture:
    """How a saved ensemble's base model is built again; nothing is imported or read yet.

    Raises:
        CheckpointError: nothing builds it, or a function does that is not trusted.
    """
    if config["architecture"] is None:
        raise CheckpointError(
            f"{path} was made from a module of the user's own, which treeify cannot build.",
            expected="that base model beside the directory",
            next_step="Load it with treeify.load(path, model=...), or convert it by name"
            " ('package.module:function') to have the name saved.",
        )
    try:
        return saved_architecture(config["architecture"], str(path), trust=trust)
    except ModelError as error:
        raise CheckpointError(f"{path / CONFIG} is damaged: {error}") from error


def memory_limit(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> MemoryLimit:
    """What a directory's model may allocate, by what its file holds.

    Raises:
        CheckpointError: its splits are damaged, or it has more leaves than numbers.
    """
    values = sum(tensor.numel() for tensor in weights.values())
    try:
        fanouts = [number or 2 for _, number in map(parse, config["splits"])]
    except (TreeifyError, ValueError) as error:  # so long that Python makes no number of it
        raise CheckpointError(f"{path / CONFIG} is damaged: {error}") from error
    if prod(fanouts) > max(values, 1):
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"at most as many leaves as there are numbers, {values:,}",
            found=f"splits {config['splits']!r:.200}",
        )
    return MemoryLimit(values, len(weights))


def restored(
    path: Path,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    architecture: Architecture | None,
    model: nn.Module | None,
    limit: AbstractContextManager[object],
) -> HierarchicalEnsemble:
    """A saved ensemble without its weights: they are not filled in yet.

    Args:
        path: its directory, for messages.
        config: of that directory.
        weights: its tensors; those that are neither parameters nor buffers are taken out.
        architecture: how the base model is built, if it is not given.
        model: the base model.
        limit: entered while memory is allocated, for the base model and for the branches.

    Raises:
        CheckpointError: it cannot be built here, or comes out another than was saved.
    """
    try:
        if model is not None:
            base, architecture = resolve(model)
        else:
            assert architecture is not None
            with limit:
                base = _built(path, config, architecture)
        base = _with_constants(path, base, weights)
        architecture = architecture or recognise(base)
        image = blank_image(base, config["example"], config.get("batch", 1))
        traced = trace_model(base, architecture, image)
        splits, source = config["splits"], copies(base)
        with limit:
            hne = assemble(base, architecture, splits, source, traced=traced, saved=True)
    except CheckpointError:
        raise
    except TreeifyError as error:
        versions = (f"{package} {number}" for package, number in config["versions"].items())
        raise CheckpointError(
            f"{path}: its base model no longer converts as recorded: {error}",
            expected=f"the versions it was saved with: {', '.join(versions)}",
        ) from error
    _check_fingerprint(path, config, hne)
    require_hooks(path, config.get("hooks", ()), hne.traced.changed_by_hooks)
    return hne


def _built(path: Path, config: Mapping[str, Any], architecture: Architecture) -> nn.Module:
    try:
        return rebuild(architecture, config["fingerprint"] if _is_comparable(config) else None)
    except ModelError as error:
        raise CheckpointError(
            f"{path} holds all weights, but its architecture {str(architecture)!r} cannot be built"
            f" here: {error}",
            next_step="Install or put on PYTHONPATH what builds it, or give the base model:"
            " treeify.load(path, model=...).",
        ) from error


def _with_constants(path: Path, base: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The base model with its plain tensors as they were, which are taken out of the weights."""
    names = [key for key in weights if key.startswith(CONSTANT)]
    if not names:
        return base
    base = copy.deepcopy(base)
    modules = dict(base.named_modules(remove_duplicate=False))
    for key in names:
        tensor = weights.pop(key)
        parent_path, _, name = key.removeprefix(CONSTANT).rpartition(".")
        parent = modules.get(parent_path)
        before = None if parent is None else vars(parent).get(name)
        # The file chooses the names: nothing else of a model may be overwritten by them.
        if not isinstance(before, Tensor) or before.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: the weights do not match the configuration.",
                expected="tensors of the base model",
                found=f"{key!r:.200} of shape {tuple(tensor.shape)}",
            )
        setattr(parent, name, tensor)
    return base


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
