"""The fx tracer: it goes into what rules do not handle as one call, and stops at side effects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar
from unittest import mock

import torch
from timm.layers import _fx as timm_registry
from torch import Tensor, fx, nn

from treeify.errors import TraceError
from treeify.tracing.proxies import Sized, Value
from treeify.tracing.replacements import OPENED, REPLACEMENTS
from treeify.tracing.side_effects import Watch, changes, contexts, has_gradient, recomputes
from treeify.tracing.sizes import Sizes

_T = TypeVar("_T")


class Tracer(fx.Tracer):
    """fx tracer that opens what rules do not handle whole, but for timm's notrace functions."""

    def __init__(
        self,
        leaf_types: frozenset[type[nn.Module]],
        leaf_modules: Collection[str],
        sizes: Sizes,
        fixed: Collection[int],
        *,
        sized: bool,
    ) -> None:
        timm_fx: Any = timm_registry  # has no annotations
        closed = (own for own in timm_fx.get_notrace_functions() if own not in OPENED)
        functions = tuple(own for own in closed if callable(own))
        super().__init__(autowrap_functions=functions)
        self.proxy_buffer_attributes = True
        self._fixed = fixed
        self._contexts = contexts()
        # timm marks some of its own modules for the sake of other tracers; yours are left alone.
        marked = (own for own in timm_fx.get_notrace_modules() if own.__module__[:5] != "timm.")
        self._leaf_types = leaf_types.union(marked)
        self._leaf_modules = leaf_modules
        self._sizes, self._sized = sizes, sized
        self._running = False
        # The innermost module that the tracer was in when it stopped.
        self.stopped_in = ""
        # Attributes that values were assigned to, and that held none before.
        self.assigned: set[str] = set()
        # Tensors made while tracing, and how often each had been changed when it was first used.
        self._made: dict[int, tuple[Tensor, int | None]] = {}
        self.recomputed, self._recomputes = False, recomputes()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The images alone: what else `forward` may be given has its default value."""

        def run(root: nn.Module, images: fx.Proxy) -> Any:
            return root.forward(images)  # the instance's own, if it has one

        # fx looks for each tensor among all of them.
        self._tensors = (*self.root.named_buffers(), *self.root.named_parameters())
        self._names = {id(own): name for name, own in self._tensors}

        return run, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's value in the model's code."""
        found = self._shapes(node) if self._sized else None
        return Value(node, self) if found is None else Sized(node, self, *found)

    def makes_tensor(self, node: fx.Node) -> bool:
        """Whether a node's value is a tensor, as far as that can be computed."""
        return self._shapes(node) is not None

    def rank(self, node: fx.Node) -> int | None:
        """How many dims a node's value has; None if it is no tensor or cannot be computed."""
        found = self._shapes(node)
        return None if found is None else len(found[0])

    def iter(self, obj: Any) -> Iterator[Any]:
        """A loop over parts that are as many for images of any size."""
        if not _is_parted(obj.node) or (count := self._computed(obj.node, Sizes.count)) is None:
            return super().iter(obj)
        return iter([obj[index] for index in range(count)])

    def _shapes(self, node: fx.Node) -> tuple[torch.Size, torch.Size] | None:
        return self._computed(node, Sizes.of)

    def _computed(self, node: fx.Node, of: Callable[[Sizes, fx.Node], _T]) -> _T:
        self._running, before = True, self._running
        try:
            return of(self._sizes, node)
        finally:
            self._running = before

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What `module.attr` gives: a proxy, where it is a parameter or buffer of the model."""
        if self._running or id(attr_val) in self._fixed:
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None or not isinstance(attr_val, Tensor):  # or made while tracing
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """What a node holds of an argument; tensors are remembered, to see if they change.

        Raises:
            TraceError: a tensor was computed from parameters without a node.
        """
        if isinstance(a, Tensor):
            if a.grad_fn is not None:
                raise TraceError("it takes parameters from a list, which no graph shows")
            self._made.setdefault(id(a), (a, changes(a)))
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        """Record a call, or those of the function that replaces the one called."""
        if kind == "call_function" and target in REPLACEMENTS:
            return REPLACEMENTS[target](*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def create_node(self, kind: str, target: Any, args: Any, *rest: Any, **named: Any) -> fx.Node:
        """Add a node to the graph.

        Raises:
            TraceError: it reads a value of another graph, or stands where gradients or autocast are
                switched.
        """
        grad, casts = contexts()
        node = super().create_node(kind, target, args, *rest, **named)
        if any(own.graph is not self.graph for own in node.all_input_nodes):
            raise TraceError("it reads a value of another pass, as a cache keeps them")
        self.recomputed |= recomputes() and not self._recomputes
        was_grad, were_casts = self._contexts
        # What no gradient would reach may be computed without.
        if casts != were_casts or (grad != was_grad and has_gradient(node, self.root)):
            raise TraceError("it switches gradients or autocast, which no graph shows")
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one call."""
        known = type(m) in self._leaf_types or module_qualified_name in self._leaf_modules
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a leaf module, or what any other module computes."""
        if self._running:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            # What forward makes of the model's own modules (`self.layers[:2]`), or of none.
            if self._has_more(m):
                raise
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        watch = Watch(m)
        replacement = REPLACEMENTS.get(type(m).forward)
        try:
            with (
                mock.patch.object(type(m), "forward", replacement) if replacement else nullcontext()
            ):
                result = super().call_module(m, forward, args, kwargs)
            self.check(watch, path)
        except Exception:
            self.stopped_in = self.stopped_in or path
            raise
        return result

    def _has_more(self, m: nn.Module) -> bool:
        """Whether a module has parameters or buffers that the traced model has not."""
        own = {id(tensor) for tensor in (*self.root.parameters(), *self.root.buffers())}
        return any(id(tensor) not in own for tensor in (*m.parameters(), *m.buffers()))

    def check(self, watch: Watch, path: str) -> None:
        """Look at what the module at a path did besides computing."""
        self.assigned.update(f"{path}.{key}" if path else key for key in watch.check())
        if any(changes(own) != before for own, before in self._made.values()):
            raise TraceError("it changes a tensor that it has used before, which no graph shows")


def _is_parted(node: fx.Node) -> bool:
    """Whether a value is a tensor in so many parts, or in parts of these sizes."""
    name = getattr(node.target, "__name__", str(node.target))
    parts = [*node.args[1:2], *node.kwargs.values()]
    listed = any(isinstance(own, list | tuple) for own in parts)
    return name == "chunk" or (name in ("split", "split_with_sizes") and listed)
