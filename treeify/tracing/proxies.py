"""What stands for the model's values while it is traced."""

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod, wraps
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from treeify.errors import TraceError
from treeify.tracing.functionalize import IN_PLACE_OPERATORS, stems_from_state, view_source
from treeify.tracing.side_effects import StateError


class ValueProxy(fx.Proxy):
    """A value that may be changed in place, but whose data are not to be exchanged.

    It answers `ndim` and `dim()` with a number. A rank hardly ever depends on the images' size, so
    the many models that check it (`if x.ndim == 3`) take images of any size all the same.
    """

    tracer: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise StateError("it assigns to a tensor's data, which no graph shows")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        if view_source(self.node) is not None and stems_from_state(self.node):
            raise TraceError("it sets a part of a view of a parameter or buffer")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    @property
    def ndim(self) -> Any:
        """The rank as of a tensor; an attribute of the value where it cannot be computed."""
        shapes = self.tracer.shapes(self.node)
        return fx.proxy.Attribute(self, "ndim") if shapes is None else len(shapes[0])

    def dim(self) -> Any:
        """The rank as of a tensor; a call where it cannot be computed."""
        shapes = self.tracer.shapes(self.node)
        if shapes is None:
            return self.tracer.create_proxy("call_method", "dim", (self,), {})
        return len(shapes[0])

    def _record_in_place(self, operation: Callable[..., Any], other: Any) -> Any:
        """Record `x += y` or the like, which fx itself takes for `x = x + y`."""
        return self.tracer.create_proxy("call_function", operation, (self, other), {})


for _operation in IN_PLACE_OPERATORS:
    _method = partialmethod(ValueProxy._record_in_place, _operation)
    setattr(ValueProxy, f"__{_operation.__name__}__", _method)


class SizedProxy(ValueProxy):
    """A tensor whose sizes are numbers while tracing, but for those that grow with the batch."""

    def __init__(
        self, node: fx.Node, tracer: fx.Tracer, small: torch.Size, large: torch.Size
    ) -> None:
        super().__init__(node, tracer)
        self._sizes = tuple(
            size if size == other else None for size, other in zip(small, large, strict=True)
        )

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes of all dims."""
        return tuple(self.size(dim) for dim in range(len(self._sizes)))

    def size(self, dim: int | None = None) -> Any:
        """The size of one dim as of a tensor, or of all."""
        if dim is None:
            return self.shape
        size = self._sizes[dim]
        if size is not None:
            return size
        return self.tracer.create_proxy("call_method", "size", (self, dim % len(self._sizes)), {})


# Packages that would go on to read a proxy's memory if they took it for a tensor.
_UNPATCHED_PACKAGES = ("torch", "treeify")


@contextmanager
def proxies_are_tensors() -> Iterator[None]:
    """Let `isinstance(x, torch.Tensor)` in a model's code be true of values that are tensors."""
    original = builtins.isinstance

    def patched(instance: Any, kinds: Any) -> bool:
        if original(instance, kinds):
            return True
        if not issubclass(type(instance), ValueProxy) or not _asks_for_tensors(kinds):
            return False
        caller = sys._getframe(1)
        package = caller.f_globals.get("__name__", "").partition(".")[0]
        asked = package not in _UNPATCHED_PACKAGES or caller.f_code.co_name == "is_tensor"
        return asked and instance.tracer.shapes(instance.node) is not None

    with mock.patch.object(builtins, "isinstance", patched):
        yield


def _asks_for_tensors(kinds: Any) -> bool:
    if kinds is Tensor:
        return True
    several = kinds if type(kinds) is tuple else get_args(kinds)
    return any(map(_asks_for_tensors, several))


# Other functions of torch ask their arguments whether they override them, as a proxy does. These
# take sizes, which they do not ask: they fail on a proxy.
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

    factories: dict[str, Any] = {name: recorded(getattr(torch, name)) for name in _FACTORIES}
    with mock.patch.multiple(torch, **factories):
        yield
