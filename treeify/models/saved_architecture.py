"""Architectures that a directory names: what may be built of them without running its code.

A directory may come from anybody. It can choose among the models of timm, torchvision and treeify;
to import what else it names, or to read weights that its arguments name, the user has to say so.
"""

from typing import Any

import treeify.models
from treeify.errors import CheckpointError, ModelError
from treeify.models.architecture import Architecture

# Names that are safe to build though they are imported: the paper's networks.
_OURS = frozenset(f"treeify.models:{name}" for name in treeify.models.__all__)
# Arguments of timm's and torchvision's builders that say which weights to load and from where, also
# inside of `pretrained_cfg`, which has the number of classes and the size of images as well.
_SOURCES = frozenset(
    {
        *("pretrained", "pretrained_cfg_overlay", "pretrained_filter_fn", "checkpoint_path"),
        *("weights", "weights_backbone", "state_dict", "custom_load", "cache_dir", "source"),
        *("url", "file", "hf_hub_id", "hf_hub_filename"),
    }
)
_LONGEST_NAME, _DEEPEST = 200, 20


def is_trusted(name: str) -> bool:
    """Whether a name is one of timm's, torchvision's or treeify's, whoever gives it."""
    # All others, `hf-hub:...` and `local-dir:...` among them, have a colon.
    return ":" not in name or name in _OURS


def without_weights(architecture: Architecture) -> Architecture:
    """The architecture without a library's arguments that name weights, however deeply nested."""
    if not is_trusted(architecture.name):
        return architecture  # what its arguments mean, only the user's function knows
    return Architecture(architecture.name, _without_sources(architecture.kwargs))


def _is_deep(value: Any, depth: int = 0) -> bool:
    """Whether arguments are nested so deeply that no builder takes them."""
    inner = value.values() if isinstance(value, dict) else value
    is_nested = isinstance(value, dict | list)
    return depth > _DEEPEST or (is_nested and any(_is_deep(item, depth + 1) for item in inner))


def _without_sources(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_sources(v) for k, v in value.items() if k not in _SOURCES}
    return [_without_sources(item) for item in value] if isinstance(value, list) else value


def saved_architecture(data: Any, where: str, *, trust: bool) -> Architecture:
    """The architecture that a saved file holds, checked: nothing is imported or built yet.

    Args:
        data: its JSON value.
        where: the file or directory, for messages.
        trust: whether the user says that what it names may be imported and called.

    Raises:
        ModelError: it does not describe an architecture.
        CheckpointError: it names a function that is no library's, and is not trusted.
    """
    if _is_deep(data):
        raise ModelError(
            f"{where} names no model.", expected=f"arguments nested at most {_DEEPEST} deep"
        )
    architecture = Architecture.from_dict(data)
    if len(architecture.name) > _LONGEST_NAME:
        raise ModelError(
            f"{where} names no model.",
            expected=f"a name of at most {_LONGEST_NAME} characters",
            found=f"{len(architecture.name):,}",
        )
    if not trust and not is_trusted(architecture.name):
        raise CheckpointError(
            f"{where} names a function of its own: {architecture.name!r} would be imported and"
            " called.",
            expected="a model of timm, torchvision or treeify.models",
            found=f"{str(architecture)!r:.200}",
            next_step="If you trust whoever wrote it, pass trust=True (--trust). Without running"
            " it: treeify.load(path, model=...), with the base model.",
        )
    return without_weights(architecture)
