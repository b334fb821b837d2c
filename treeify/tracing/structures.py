"""The structures of tensors that models return: dicts and dataclasses of the user's own, too."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import SUPPORTED_NODES, register_pytree_node


def register_structures(value: Any) -> None:
    """Let torch look into the dataclasses and dicts in a value, as it does into plain dicts."""
    kind = type(value)
    if isinstance(value, dict):
        if kind not in SUPPORTED_NODES:
            register_pytree_node(kind, _flatten, lambda parts, keys: _unflatten(kind, parts, keys))
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_dataclass(kind):
        if kind not in SUPPORTED_NODES:
            torch.export.register_dataclass(kind)
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        return
    for part in parts:
        register_structures(part)


def _flatten(value: dict[Hashable, Any]) -> tuple[list[Any], tuple[Hashable, ...]]:
    return list(value.values()), tuple(value)


def _unflatten(kind: type[dict[Any, Any]], parts: Any, keys: tuple[Hashable, ...]) -> Any:
    items = dict(zip(keys, parts, strict=True))
    return kind(**items) if is_dataclass(kind) else kind(items)


def construction(value: Mapping[Any, Any]) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """The call that makes a dict of a user's class again: a function, its arguments, by name too.

    A dataclass that is a dict as well, as the outputs of `transformers` are, takes its fields.
    """
    kind: Any = type(value)
    if is_dataclass(type(value)):
        return kind, (), dict(value)
    if isinstance(value, defaultdict):
        factory = value.default_factory

        def make(items: Mapping[Any, Any]) -> Any:
            return kind(factory, items)

        make.__name__ = kind.__name__
        return make, (dict(value),), {}
    return kind, (dict(value),), {}


def mutable(value: Any) -> Any:
    """Arguments of a node as the model's code has them: fx keeps lists and dicts immutable."""
    if type(value) is immutable_list:
        return [mutable(item) for item in value]
    if type(value) is immutable_dict:
        return {key: mutable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [mutable(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
