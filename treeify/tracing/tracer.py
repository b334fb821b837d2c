"""A model -> its fx graphs, opened as deep as tracing goes.

Tracing is tried with the images' size unknown, then with the sizes of an example, on which some
models' control flow depends. A module whose inside stops the tracer even so stays closed.
"""

from __future__ import annotations

import copy
import operator
import random
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from timm.layers import _fx as timm_registry
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from treeify.errors import TraceError
from treeify.tracing import proxies, side_effects
from treeify.tracing.functionalize import CONSTANT
from treeify.tracing.meta_kernels import Shortcuts
from treeify.tracing.proxies import Sized, Value, instances_told
from treeify.tracing.replacements import OPENED, STAND_INS
from treeify.tracing.side_effects import (
    StateError,
    Watch,
    attributes,
    closed_functions,
    contexts,
    has_gradient,
    recomputes,
)

_T = TypeVar("_T")
# How many images what depends on their number is told apart with.
BATCHES = (2, 3)


class Sizes:
    """What a graph's nodes give at two batch sizes, on the meta device, while it is being traced.

    Args:
        private: the model that is traced.
        skeleton: its copy on the meta device.
        example: shape of one image, `(C, H, W)`.
    """

    def __init__(self, private: nn.Module, skeleton: nn.Module, example: tuple[int, ...]) -> None:
        self._private, self._skeleton, self._example = private, skeleton, example
        self._values: dict[fx.Node, list[Any]] = {}

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Put the model and its copy in one mode; undo what passes leave behind in them."""
        self._values.clear()
        with ExitStack() as stack:
            for model in (self._private, self._skeleton):
                stack.enter_context(in_mode(model, training))
            yield

    def of(self, node: fx.Node) -> tuple[torch.Size, torch.Size] | None:
        """Both shapes of a node's output; None if it is no tensor or cannot be computed."""
        small, large = self._of(node)
        if not isinstance(small, Tensor) or small.ndim != large.ndim:
            return None
        return small.shape, large.shape

    def count(self, node: fx.Node) -> int | None:
        """How many tensors a node gives; None if it gives no tuple, or another at each size."""
        found = {len(own) if isinstance(own, tuple) else None for own in self._of(node)}
        return found.pop() if len(found) == 1 else None

    def _of(self, node: fx.Node) -> list[Any]:
        """A node's output at both batch sizes, all those before it being computed."""
        if node not in self._values:
            for other in node.graph.nodes:
                if other not in self._values:
                    self._values[other] = self._compute(other)
        return self._values[node]

    def _compute(self, node: fx.Node) -> list[Any]:
        """A node's output at both batch sizes; `NotImplemented` where it cannot be computed."""
        states = random.getstate(), np.random.get_state()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), Shortcuts():
                return [self._value(node, run) for run in range(len(BATCHES))]
        except Exception:  # whatever a library raises for what the meta device cannot do
            return [NotImplemented] * len(BATCHES)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _value(self, node: fx.Node, run: int) -> Any:
        def known(other: fx.Node) -> Any:
            found = self._values[other][run]
            if found is NotImplemented:
                raise ValueError(f"{other} is not known")
            return found

        args, kwargs = fx.map_arg((node.args, node.kwargs), known)
        if node.op == "placeholder":
            return torch.zeros(BATCHES[run], *self._example, device="meta")
        if node.op == "get_attr":
            found = operator.attrgetter(str(node.target))(self._private)
            return found.to("meta") if isinstance(found, Tensor) else found
        if node.op == "call_module":
            return self._skeleton.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Tracer(fx.Tracer):
    """fx tracer that opens what rules do not handle whole, but for timm's notrace functions."""

    def __init__(
        self,
        leaf_types: frozenset[type[nn.Module]],
        unopened: Collection[str],
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
        self._unopened = unopened
        self._sizes, self._sized = sizes, sized
        self._running = False
        # The innermost module that the tracer was in when it stopped.
        self.stopped_in = ""
        # Attributes that values were assigned to, and that held none before.
        self.kept: set[str] = set()
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
        if self._running or id(attr_val) in self._fixed:
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None or not isinstance(attr_val, Tensor):  # or made while tracing
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if a.grad_fn is not None:
                raise TraceError("it takes parameters from a list, which no graph shows")
            self._made.setdefault(id(a), (a, _changes(a)))
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        if kind == "call_function" and target in STAND_INS:
            return STAND_INS[target](*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def create_node(self, kind: str, target: Any, args: Any, *rest: Any, **named: Any) -> fx.Node:
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
        known = type(m) in self._leaf_types or module_qualified_name in self._unopened
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
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
        stand_in = STAND_INS.get(type(m).forward)
        try:
            with mock.patch.object(type(m), "forward", stand_in) if stand_in else nullcontext():
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
        self.kept.update(f"{path}.{key}" if path else key for key in watch.check())
        if any(_changes(own) != before for own, before in self._made.values()):
            raise TraceError("it changes a tensor that it has used before, which no graph shows")


def _is_parted(node: fx.Node) -> bool:
    """Whether a value is a tensor in so many parts, or in parts of these sizes."""
    name = getattr(node.target, "__name__", str(node.target))
    parts = [*node.args[1:2], *node.kwargs.values()]
    listed = any(isinstance(own, list | tuple) for own in parts)
    return name == "chunk" or (name in ("split", "split_with_sizes") and listed)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model in one mode; then undo that and what passes leave behind, such as caches."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (module, {**vars(module), **{table: dict(vars(module)[table]) for table in tables}})
        for module in model.modules()
    ]
    caches = [
        (own, copy.copy(own))
        for module in model.modules()
        for own in attributes(module).values()
        if isinstance(own, dict | list)
    ]
    try:
        model.train(training)
        yield
    finally:
        found = {name: value for name, value in vars(model).items() if name.startswith(CONSTANT)}
        for module, state in before:
            vars(module).clear()
            vars(module).update(state)
        for own, was in caches:
            own.clear()
            if isinstance(own, dict):
                own.update(was)
            else:
                own.extend(was)
        vars(model).update(found)


# They take sizes, and look for no tensor's say in them as other functions do.
_FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "zeros"),
    *("rand", "randint", "randn", "randperm"),
)


@contextmanager
def _recorded_factories() -> Iterator[None]:
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


def trace_modes(
    private: nn.Module,
    leaf_types: frozenset[type[nn.Module]],
    sizes: Sizes,
    unopened: dict[str, str],
) -> tuple[dict[bool, fx.Graph], Limits]:
    """Both modes' graphs, and what they are limited to.

    Args:
        private: the model.
        leaf_types: module types to keep whole.
        sizes: answers to what the model asks about sizes.
        unopened: by module that stays closed, the reason; those that have to, in either mode, are
            added.

    Raises:
        TraceError: the model's own forward cannot be traced.
    """
    while True:
        before = len(unopened)
        found = {
            training: _trace_mode(private, training, leaf_types, unopened, sizes)
            for training in (False, True)
        }
        if len(unopened) == before:
            graphs = {training: graph for training, (graph, _) in found.items()}
            limits = [own for _, own in found.values()]
            fixed = sorted({name for own in limits for name in own.fixed})
            one_size = any(own.one_size for own in limits)
            recomputed = any(own.recomputed for own in limits)
            kept = sorted({name for own in limits for name in own.kept})
            return graphs, Limits(one_size, tuple(fixed), recomputed, tuple(kept))


@dataclass(frozen=True)
class Limits:
    """What holds beyond the graph's own inputs.

    Args:
        one_size: images must have the example's height and width, since what the model does depends
            on them.
        fixed: buffers whose present values decide what the model does.
        recomputed: whether activations were to be computed again in the backward pass.
        kept: attributes in which modules put values, and which held none before.
    """

    one_size: bool
    fixed: tuple[str, ...]
    recomputed: bool
    kept: tuple[str, ...]


@dataclass(frozen=True)
class _Stop:
    """Where a try at tracing ended.

    Args:
        nodes: how many there were by then.
        inside: the innermost module it was in; empty in the model's own forward.
        error: what ended it.
    """

    nodes: int
    inside: str
    error: Exception

    @property
    def reason(self) -> str:
        """What ended it, for the report."""
        if isinstance(self.error, TraceError):
            return str(self.error)
        where = _user_line(self.error, imported=True)
        return f"{type(self.error).__name__} at {where}"


def _trace_mode(
    private: nn.Module,
    training: bool,
    leaf_types: frozenset[type[nn.Module]],
    unopened: dict[str, str],
    sizes: Sizes,
) -> tuple[fx.Graph, Limits]:
    """One mode's graph, and what it is limited to; what stops the tracer is left closed."""
    while True:
        # A model that branches on sizes can only be traced with those of the example's images.
        stops: list[_Stop] = []
        for sized in (False, True):
            try:
                found = _try(private, training, leaf_types, unopened, sizes, stops, sized=sized)
            except StateError as error:
                raise _untraceable(private, training, error) from error
            if found is not None:
                return found
        furthest = max(stops, key=lambda stop: stop.nodes)
        if not furthest.inside or furthest.inside in unopened:
            raise _untraceable(private, training, furthest.error) from furthest.error
        unopened[furthest.inside] = furthest.reason


def _try(
    private: nn.Module,
    training: bool,
    leaf_types: frozenset[type[nn.Module]],
    unopened: Collection[str],
    sizes: Sizes,
    stops: list[_Stop],
    *,
    sized: bool,
) -> tuple[fx.Graph, Limits] | None:
    """A mode's graph, with the images' size unknown or known; else where that stopped.

    Buffers are values of the graph, which keeps their in-place updates. One that decides what the
    model does (a counter, a flag) has its present value instead.

    Raises:
        StateError: a module has a state that branches cannot have one each of.
    """
    buffers = {id(buffer): _changes(buffer) for buffer in private.buffers()}
    fixed: set[str] = set()
    while True:
        ids = {id(private.get_buffer(name)) for name in fixed}
        tracer = _Tracer(leaf_types, unopened, sizes, ids, sized=sized)
        with (
            sizes.mode(training),
            _recorded_factories(),
            instances_told(),
            closed_functions() as left_out,
        ):
            watch = Watch(private)
            try:
                graph = tracer.trace(private)
                tracer.check(watch, "")
            except StateError:
                raise
            except Exception as error:
                stops.append(_Stop(len(tracer.graph.nodes), tracer.stopped_in, error))
                further = _deciding(tracer.graph, private) - fixed
                if not further:
                    return None
                fixed |= further
                continue
            assigned = _assigned(private, buffers)
            if assigned is None:
                recomputed = tracer.recomputed or bool(left_out)
                return graph, Limits(sized, tuple(fixed), recomputed, tuple(tracer.kept))
            path, name = assigned
            problem = TraceError(f"it assigns to its buffer {name!r}, which no graph shows")
            stops[:] = [_Stop(len(tracer.graph.nodes), path, problem)]
            return None


def _deciding(graph: fx.Graph, model: nn.Module) -> set[str]:
    """The buffers that the last value of a graph was computed from, if from nothing else."""
    buffers = {name for name, _ in model.named_buffers()}
    found, left = set(), [next(reversed(graph.nodes))] if len(graph.nodes) else []
    while left:
        node = left.pop()
        if node.op == "get_attr" and str(node.target) in buffers:
            found.add(str(node.target))
        elif node.op not in ("call_method", "call_function"):
            return set()
        left += node.all_input_nodes
    return found


def _assigned(model: nn.Module, before: Mapping[int, int | None]) -> tuple[str, str] | None:
    """A module and its buffer that a traced pass has assigned to, as `self.steps += 1` does.

    Caches, which no state dict has, do not count: each pass makes its own.

    Args:
        model: what was traced.
        before: the ids of its buffers before, and how often each had been changed.
    """
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            lasting = name not in module._non_persistent_buffers_set
            if not lasting or buffer is None:
                continue
            if id(buffer) not in before or _changes(buffer) != before[id(buffer)]:
                return path, name
    return None


def _changes(tensor: Tensor) -> int | None:
    """How often a tensor was changed; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def _untraceable(private: nn.Module, training: bool, failure: Exception) -> TraceError:
    ours = isinstance(failure, TraceError)
    return TraceError(
        f"{type(private).__name__} cannot be traced in {'training' if training else 'eval'} mode:"
        f" {failure if ours else f'{type(failure).__name__}: {failure}'}",
        expected="a forward pass whose effects are all seen in its tensors"
        if ours
        else "a forward pass whose control flow does not depend on tensor values",
        found=f"stopped at {_user_line(failure)}",
        next_step="Keep it in a buffer, or set it outside of forward."
        if isinstance(failure, StateError)
        else "Move that line into a module of its own: it then runs per branch, unopened.",
    )


def _user_line(error: BaseException, *, imported: bool = False) -> str:
    """The innermost line of the traceback that belongs neither to torch nor to the tracer.

    Its file's whole path, or that below the folder it was imported from: the same on any machine.
    """
    torch_root = str(Path(torch.__file__).parent)
    own = (__file__, proxies.__file__, side_effects.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_root, *own, "<"))
    ]
    if not frames:
        return "an unknown line"
    last = frames[-1]
    file = _below_imports(Path(last.filename)) if imported else last.filename
    return f"{file}:{last.lineno} in {last.name}: {last.line}"


def _below_imports(file: Path) -> Path:
    """A file's path below the folder it was imported from."""
    folders = [folder for folder in map(Path, sys.path) if folder in file.parents]
    if not folders:
        return file
    return file.relative_to(max(folders, key=lambda folder: len(folder.parts)))
