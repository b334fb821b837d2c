"""What stands for the model's values while it is traced."""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from treeify.errors import TraceError
from treeify.tracing.functionalize import IN_PLACE_OPERATORS, looks_into, stems_from_state
from treeify.tracing.side_effects import StateError


class Value(fx.Proxy):
    """A value that may be changed in place, but whose data are not to be exchanged."""

    tracer: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise StateError("it assigns to a tensor's data, which no graph shows")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        if looks_into(self.node) is not None and stems_from_state(self.node):
            raise TraceError("it sets a part of a view of a parameter or buffer")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    @property
    def ndim(self) -> Any:
        """As of a tensor: a number, which does not depend on the images' size."""
        rank = self.tracer.rank(self.node)
        return fx.proxy.Attribute(self, "ndim") if rank is None else rank

    def dim(self) -> Any:
        """As of a tensor."""
        rank = self.tracer.rank(self.node)
        if rank is None:
            return self.tracer.create_proxy("call_method", "dim", (self,), {})
        return rank


def _in_place(operation: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    """What `x += y` and the like record: fx itself takes them for `x = x + y`."""

    def change(own: fx.Proxy, other: Any) -> Any:
        return own.tracer.create_proxy("call_function", operation, (own, other), {})

    return change


for _operation in IN_PLACE_OPERATORS:
    setattr(Value, f"__{_operation.__name__}__", _in_place(_operation))


class Sized(Value):
    """A tensor whose sizes are numbers while tracing, but for those that grow with the batch."""

    def __init__(
        self, node: fx.Node, tracer: fx.Tracer, small: torch.Size, large: torch.Size
    ) -> None:
        super().__init__(node, tracer)
        self._sizes = tuple(
            one if one == other else None for one, other in zip(small, large, strict=True)
        )

    @property
    def shape(self) -> tuple[Any, ...]:
        """Numbers, but for dims that grow with the batch."""
        return tuple(self.size(dim) for dim in range(len(self._sizes)))

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        if dim is None:
            return self.shape
        known = self._sizes[dim]
        if known is not None:
            return known
        return self.tracer.create_proxy("call_method", "size", (self, dim % len(self._sizes)), {})


# Packages that would take values for tensors in memory.
_NOT_TOLD = ("torch", "treeify")


@contextmanager
def instances_told() -> Iterator[None]:
    """Let `isinstance(x, torch.Tensor)` in a model's code be true of values that are tensors."""
    original = builtins.isinstance

    def told(found: Any, kinds: Any) -> bool:
        if original(found, kinds):
            return True
        if not issubclass(type(found), Value) or not _asks_for_tensors(kinds):
            return False
        frame = sys._getframe(1)
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        asked = package not in _NOT_TOLD or frame.f_code.co_name == "is_tensor"
        return asked and found.tracer.makes_tensor(found.node)

    with mock.patch.object(builtins, "isinstance", told):
        yield


def _asks_for_tensors(kinds: Any) -> bool:
    if kinds is Tensor:
        return True
    several = kinds if type(kinds) is tuple else get_args(kinds)
    return any(map(_asks_for_tensors, several))


# They take sizes, and look for no tensor's say in them as other functions do.
_FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "zeros"),
    *("rand", "randint", "randn", "randperm"),
)


@contextmanager
def recorded_factories() -> Iterator[None]:
    """Record calls of `torch.zeros(x.shape[0], ...)` and the like, which fx does not."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, kwargs))
            proxy = next((leaf for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
            if proxy is None:
                return function(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", function, args, kwargs)

        return call

    with ExitStack() as stack:
        for name in _FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, recorded(getattr(torch, name))))
        yield
