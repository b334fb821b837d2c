"""The fx tracer: it goes into all but leaf modules, and stops at what no graph shows."""

import threading
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import _fx as timm_registry
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch.fx.immutable_collections import immutable_dict

from treeify.errors import TraceError
from treeify.tracing.proxies import SizedProxy, ValueProxy
from treeify.tracing.replacements import REPLACEMENTS, TRACED_ANYWAY
from treeify.tracing.side_effects import (
    Snapshot,
    gradient_and_autocast,
    has_gradient,
    has_saved_tensor_hooks,
    version,
)
from treeify.tracing.sizes import Sizes
from treeify.tracing.structures import construction

_T = TypeVar("_T")


class Tracer(fx.Tracer):
    """Traces one mode of a model with either unknown or known sizes.

    `fixed_buffers` are the ids of those that decide what the model does, and are read as they are
    now. If `known_sizes`, sizes are numbers while tracing, but for those of the batch.
    """

    def __init__(
        self,
        leaf_types: frozenset[type[nn.Module]],
        leaf_modules: Collection[str],
        sizes: Sizes,
        fixed_buffers: Collection[int],
        *,
        known_sizes: bool,
    ) -> None:
        """Note what is one call, and what holds before the model's code runs."""
        timm_fx: Any = timm_registry  # has no annotations
        functions = set(timm_fx.get_notrace_functions()).difference(TRACED_ANYWAY)
        super().__init__(autowrap_functions=tuple(filter(callable, functions)))
        # Buffers become nodes as parameters do, so that every branch reads and updates its own.
        self.proxy_buffer_attributes = True
        # timm marks modules of its own for the sake of other tracers; a user's marks are meant.
        marked = {kind for kind in timm_fx.get_notrace_modules() if kind.__module__[:5] != "timm."}
        self._leaf_types, self._leaf_modules = leaf_types | marked, leaf_modules
        self._sizes, self._known_sizes, self._fixed_buffers = sizes, known_sizes, fixed_buffers
        # While `sizes` runs the model's modules, fx's patches of `nn.Module` are to record nothing;
        # nor what modules do in other threads, which the patches reach too.
        self._computing_sizes, self._thread = False, threading.get_ident()
        self._contexts, self._had_hooks = gradient_and_autocast(), has_saved_tensor_hooks()
        # Tensors made while tracing, and how often each had been changed when it was first used.
        self._constants: dict[int, tuple[Tensor, int | None]] = {}
        # By their ids, all tensors that the model's code has read.
        self.read: dict[int, Tensor] = {}
        # The innermost module that the tracer was in when it stopped.
        self.stopped_in = ""
        # Attributes that values were assigned to, and that held none before.
        self.assigned: set[str] = set()
        self.recomputed = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The images alone: what else `forward` may be given has its default value."""

        def run(root: nn.Module, images: fx.Proxy) -> Any:
            return root.forward(images)  # the instance's own, if it has one

        # fx looks for each tensor among all of them: a table is faster.
        tensors = (*self.root.named_buffers(), *self.root.named_parameters())
        self._names = {id(tensor): name for name, tensor in tensors}
        return run, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's value in the model's code."""
        shapes = self.shapes(node) if self._known_sizes else None
        return ValueProxy(node, self) if shapes is None else SizedProxy(node, self, *shapes)

    def shapes(self, node: fx.Node) -> tuple[torch.Size, torch.Size] | None:
        """Both shapes of a node's value; None if it is no tensor or cannot be computed."""
        return self._compute(self._sizes.shapes, node)

    def iter(self, obj: Any) -> Iterator[Any]:
        """A loop over parts that are as many for images of any size."""
        if not _splits_tensor(obj.node):
            return super().iter(obj)
        length = self._compute(self._sizes.tuple_length, obj.node)
        return super().iter(obj) if length is None else iter([obj[part] for part in range(length)])

    def _compute(self, answer: Callable[[fx.Node], _T], node: fx.Node) -> _T:
        # What a size is asked for may ask for another: the outer question ends the computing.
        before, self._computing_sizes = self._computing_sizes, True
        try:
            return answer(node)
        finally:
            self._computing_sizes = before

    def _is_recording(self) -> bool:
        return not self._computing_sizes and threading.get_ident() == self._thread

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What `module.attr` gives: a proxy where it is a parameter or buffer of the model."""
        if not self._is_recording() or id(attr_val) in self._fixed_buffers:
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None or not isinstance(attr_val, Tensor):  # or made while tracing
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """An argument as a node holds it, if it was not computed unseen from parameters."""
        if isinstance(a, Tensor):
            if a.grad_fn is not None:
                raise TraceError("it takes parameters from a list, which no graph shows")
            # The graph reads the tensor as it is at the end: see `check_side_effects`.
            self._constants.setdefault(id(a), (a, version(a)))
            self.read[id(a)] = a
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            function, args, kwargs = construction(a)  # fx itself makes a plain dict of it
            return self.create_node(
                "call_function", function, super().create_arg(args), super().create_arg(kwargs)
            )
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *options: Any, **named: Any
    ) -> Any:
        """Record a call, or those of the function that replaces the one called."""
        if kind == "call_function" and target in REPLACEMENTS:
            return REPLACEMENTS[target](*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *options, **named)

    def create_node(
        self, kind: str, target: Any, args: Any, *options: Any, **named: Any
    ) -> fx.Node:
        """Add a node to the graph, if there it gives what it gives in the model."""
        node = super().create_node(kind, target, args, *options, **named)
        if any(source.graph is not self.graph for source in node.all_input_nodes):
            raise TraceError("it reads a value of another pass, as a cache keeps them")
        self.recomputed |= has_saved_tensor_hooks() and not self._had_hooks
        # A graph has no `with`: its nodes would run outside of it. `no_grad` does no harm where no
        # gradient would reach anyway.
        (gradient, autocast), (had_gradient, had_autocast) = gradient_and_autocast(), self._contexts
        switched = gradient != had_gradient and has_gradient(node, self.root)
        if autocast != had_autocast or switched:
            raise TraceError("it switches gradients or autocast, which no graph shows")
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one call of the graph."""
        return (
            type(m) in self._leaf_types
            or module_qualified_name in self._leaf_modules
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a leaf module, or what any other module computes."""
        if not self._is_recording():
            return forward(*args, **kwargs)
        if isinstance(m, OptimizedModule):
            return m._orig_mod(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            # What forward makes of the model's own modules (`self.layers[:2]`), or of none.
            ids = {id(tensor) for tensor in (*self.root.parameters(), *self.root.buffers())}
            if any(id(tensor) not in ids for tensor in (*m.parameters(), *m.buffers())):
                raise
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        method = getattr(m.forward, "__func__", None)
        if method in REPLACEMENTS:
            forward = partial(REPLACEMENTS[method], m)
        before = Snapshot(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self.check_side_effects(before, path)
        except Exception:
            self.stopped_in = self.stopped_in or path
            raise
        return result

    def check_side_effects(self, before: Snapshot, path: str) -> None:
        """Note what the module at a path assigned, and refuse its other side effects."""
        self.assigned.update(f"{path}.{key}" if path else key for key in before.compare(self.read))
        if any(version(tensor) != first for tensor, first in self._constants.values()):
            raise TraceError("it changes a tensor that it has used before, which no graph shows")


def _splits_tensor(node: fx.Node) -> bool:
    """Whether a value is a tensor in so many parts, or in parts of these sizes."""
    name = getattr(node.target, "__name__", str(node.target))
    parts = [*node.args[1:2], *node.kwargs.values()]
    listed = any(isinstance(part, list | tuple) for part in parts)
    return name == "chunk" or (name in ("split", "split_with_sizes") and listed)
