"""Base model -> fx graphs, one for training and one for evaluation, with what each node computes.

Tracing freezes `self.training` into functional calls, so both modes get their own graph over the
same parameters. Every node is annotated with `Facts`: the module it stems from, the values it
produces (found by running the graph at two batch sizes on the meta device) and its MACs.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.layers import _fx as timm_registry
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from treeify.errors import InputError, TraceError

_BATCHES = (2, 3)
_PARAMETER_SOURCES = ("torch.nn.utils",)


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the base model, as seen at two batch sizes.

    Args:
        shape: its shape for a batch of 2.
        batched: whether dim 0 is the batch, one row per image.
        batch_dim: the one dim that grows with the batch, as the batch itself or a multiple of it
            (windows of every image); None where there is no such dim.
    """

    shape: tuple[int, ...]
    batched: bool
    batch_dim: int | None = None

    @property
    def folds(self) -> bool:
        """Whether branches ride in dim 1 (`[N, G*C, ...]`), not in a new dim 0 (`[G, ...]`)."""
        return self.batched and len(self.shape) >= 2

    @property
    def counts_images(self) -> bool:
        """Whether the dim that grows with the batch has one place per image, not several."""
        return self.batch_dim is not None and self.shape[self.batch_dim] == _BATCHES[0]


@dataclass(frozen=True)
class Facts:
    """What is known of one node.

    Args:
        path: unique readable name: the module path, and for functions the operation inside it.
        scope: path of the module the node stems from.
        value: the node's output with every tensor replaced by its `TensorFacts`.
        grows: the node's output with every integer replaced by whether it is proportional to the
            batch; None where a number depends on the batch in another way.
        macs: multiply-accumulates per image; counted for evaluation only.
        rows: whether dropping images from the batch means dropping rows of the tensors, no more.
    """

    path: str
    scope: str
    value: Any
    grows: Any
    macs: int
    rows: bool

    @property
    def tensors(self) -> list[TensorFacts]:
        """The tensors in the output."""
        return [leaf for leaf in tree_leaves(self.value) if isinstance(leaf, TensorFacts)]


@dataclass(frozen=True)
class Traced:
    """A base model opened up.

    Args:
        skeleton: the base architecture on the meta device; graph targets refer to it.
        graphs: by mode, `False` for evaluation and `True` for training.
        example: shape of one input image, `(C, H, W)`.
        constants: by graph target, tensors that are neither parameters nor buffers.
        unopened: modules whose insides stopped the tracer, each run as one call, and what did it.
        one_size: whether images must have the example's height and width, since what the model does
            depends on them.
    """

    skeleton: nn.Module
    graphs: Mapping[bool, fx.Graph]
    example: tuple[int, ...]
    constants: Mapping[str, Any]
    unopened: Mapping[str, str]
    one_size: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        """Itself: nothing ever changes it, so copies of an ensemble share it."""
        return self


def facts(node: fx.Node) -> Facts:
    """The annotation `trace` left on a node."""
    found: Facts = node.meta["treeify"]
    return found


def trace(
    model: nn.Module, example: Tensor, leaf_types: frozenset[type[nn.Module]] = frozenset()
) -> Traced:
    """Trace a classifier in both modes and annotate every node.

    A model whose control flow depends on the images' size is traced for the example's. A module
    whose inside cannot be traced even so (control flow that depends on tensor values) stays closed
    and is one call; all the others are opened.

    Args:
        model: the base model, `[N, C, H, W] -> [N, K]`. Not modified.
        example: an input of any batch size; only its shape and dtype matter.
        leaf_types: module types to keep whole, besides torch's and timm's own.

    Raises:
        TraceError: the model's own forward cannot be traced; names the line that stopped it.
        InputError: the model does not run on the example's shape.
    """
    with torch.random.fork_rng(devices=[]):
        private = _private_copy(model)
        skeleton = _on_meta(private)
        sizes = _Sizes(private, skeleton, tuple(example.shape[1:]))
        graphs, unopened, one_size = _trace_modes(private, leaf_types, sizes)
        constants: dict[str, Any] = {}
        for training, graph in graphs.items():
            functionalize(graph, private)
            _annotate(graph, private, skeleton, example, training)
            graph.lint()
            constants |= _constants(graph, private)
    return Traced(skeleton, graphs, tuple(example.shape[1:]), constants, unopened, one_size)


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy without the user's hooks: they observe, they are not part of the architecture."""
    try:
        private = copy.deepcopy(model)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {error}",
            expected="a module that copy.deepcopy accepts, since the given model is never modified",
        ) from error
    for module in private.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for key, hook in list(hooks.items()):
                # weight_norm and spectral_norm compute parameters in a hook: that is architecture.
                if not type(hook).__module__.startswith(_PARAMETER_SOURCES):
                    del hooks[key]
    return private


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without weights; tensors that are one in the model are one in the copy."""
    memo: dict[int, Any] = {}
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


class _Sized(fx.Proxy):
    """A tensor whose sizes are numbers while tracing, but for those that grow with the batch."""

    def __init__(
        self, node: fx.Node, tracer: fx.Tracer, small: torch.Size, large: torch.Size
    ) -> None:
        super().__init__(node, tracer)
        self._sizes = tuple(
            one if one == other else None for one, other in zip(small, large, strict=True)
        )

    @property
    def ndim(self) -> int:
        return len(self._sizes)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.size(dim) for dim in range(self.ndim))

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        known = self._sizes[dim]
        if known is not None:
            return known
        return self.tracer.create_proxy("call_method", "size", (self, dim % self.ndim), {})


class _Sizes:
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
        """Put the model and its copy in one mode, and forget what was traced before."""
        self._values.clear()
        with _mode(self._private, training), _mode(self._skeleton, training):
            yield

    def of(self, node: fx.Node) -> tuple[torch.Size, torch.Size] | None:
        """Both shapes of a node's output; None if it is no tensor or cannot be computed."""
        try:
            with torch.no_grad():
                found = [self._value(node, run) for run in range(len(_BATCHES))]
        except Exception:  # whatever a library raises for what the meta device cannot do
            return None
        self._values[node] = found
        small, large = found
        if not isinstance(small, Tensor) or small.ndim != large.ndim:
            return None
        return small.shape, large.shape

    def _value(self, node: fx.Node, run: int) -> Any:
        def known(other: fx.Node) -> Any:
            # The tracer makes no proxy of constants.
            found = self._values.get(other)
            if found is None and other.op == "get_attr":
                return self._value(other, run)
            return self._values[other][run]

        args, kwargs = fx.map_arg((node.args, node.kwargs), known)
        if node.op == "placeholder":
            if node.prev.op != "root":
                return args[0]
            return torch.zeros(_BATCHES[run], *self._example, device="meta")
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
        sizes: _Sizes | None,
        *,
        proxy_buffers: bool,
    ) -> None:
        timm_fx: Any = timm_registry  # has no annotations
        functions = tuple(fn for fn in timm_fx.get_notrace_functions() if callable(fn))
        super().__init__(autowrap_functions=functions)
        self.proxy_buffer_attributes = proxy_buffers
        self._leaf_types = leaf_types
        self._unopened = unopened
        self._sizes = sizes
        self._running = False
        # The innermost module that the tracer was in when it stopped.
        self.stopped_in = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if self._sizes is None:
            return super().proxy(node)
        self._running = True
        try:
            found = self._sizes.of(node)
        finally:
            self._running = False
        return super().proxy(node) if found is None else _Sized(node, self, *found)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in self._leaf_types or module_qualified_name in self._unopened
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped_in = self.stopped_in or self.path_of_module(m)
            raise


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a pass that is traced leaves behind in its modules, such as caches of sizes."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (module, {**vars(module), **{table: dict(vars(module)[table]) for table in tables}})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        found = {name: value for name, value in vars(model).items() if name.startswith(_CONSTANT)}
        for module, state in before:
            vars(module).clear()
            vars(module).update(state)
        vars(model).update(found)


# How fx names tensors that are neither parameters nor buffers, in the model it traces.
_CONSTANT = "_tensor_constant"
# They take sizes, and look for no tensor's say in them as other functions do.
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")


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

    factories = {name: recorded(getattr(torch, name)) for name in _FACTORIES}
    with mock.patch.multiple(torch, **factories):
        yield


def _trace_modes(
    private: nn.Module, leaf_types: frozenset[type[nn.Module]], sizes: _Sizes
) -> tuple[dict[bool, fx.Graph], dict[str, str], bool]:
    """Both modes' graphs.

    Also the modules that had to stay closed, in either, with the reason; and whether either graph
    is for images of the given size alone.
    """
    unopened: dict[str, str] = {}
    while True:
        before = len(unopened)
        found = {
            training: _trace_mode(private, training, leaf_types, unopened, sizes)
            for training in (False, True)
        }
        if len(unopened) == before:
            graphs = {training: graph for training, (graph, _) in found.items()}
            return graphs, unopened, any(one_size for _, one_size in found.values())


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


def _trace_mode(
    private: nn.Module,
    training: bool,
    leaf_types: frozenset[type[nn.Module]],
    unopened: dict[str, str],
    sizes: _Sizes,
) -> tuple[fx.Graph, bool]:
    """One mode's graph, and whether it is for one size; what stops the tracer is left closed."""
    while True:
        # Buffers seen as graph values keep their in-place updates; a model that branches on a
        # buffer (a counter, a flag) can only be traced with its present value: the second try. One
        # that branches on sizes can only be traced with those of the example's images.
        stops: list[_Stop] = []
        for known, proxy_buffers in product((None, sizes), (True, False)):
            tracer = _Tracer(leaf_types, unopened, known, proxy_buffers=proxy_buffers)
            with sizes.mode(training), _unchanged(private), _recorded_factories():
                try:
                    graph = tracer.trace(private, concrete_args=_defaults(private))
                except Exception as error:
                    stops.append(_Stop(len(tracer.graph.nodes), tracer.stopped_in, error))
                else:
                    return graph, known is not None
        furthest = max(stops, key=lambda stop: stop.nodes)
        if not furthest.inside or furthest.inside in unopened:
            raise _untraceable(private, training, furthest.error) from furthest.error
        reason = f"{type(furthest.error).__name__} at {_user_line(furthest.error)}"
        unopened[furthest.inside] = reason


def _untraceable(private: nn.Module, training: bool, failure: Exception) -> TraceError:
    return TraceError(
        f"{type(private).__name__} cannot be traced in {'training' if training else 'eval'} mode:"
        f" {type(failure).__name__}: {failure}",
        expected="a forward pass whose control flow does not depend on tensor values",
        found=f"stopped at {_user_line(failure)}",
        next_step="Move that line into a module of its own: it then runs per branch, unopened.",
    )


def _constants(graph: fx.Graph, private: nn.Module) -> dict[str, Any]:
    """Values the graph reads that are neither parameters nor buffers, left behind by tracing."""
    state = {name for name, _ in (*private.named_parameters(), *private.named_buffers())}
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - state
    return {target: operator.attrgetter(target)(private) for target in targets}


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments the user leaves alone, with their default values: they are fixed while tracing."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in one mode and give each its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was in before:
            module.training = was


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that belongs neither to torch nor to this file."""
    torch_root = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_root, __file__, "<"))
    ]
    if not frames:
        return "an unknown line"
    last = frames[-1]
    return f"{last.filename}:{last.lineno} in {last.name}: {last.line}"


_IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}
_VIEWS = {
    *("view", "reshape", "transpose", "permute", "chunk", "split", "narrow", "unbind", "flatten"),
    *("squeeze", "unsqueeze", "expand", "select", "getitem", "swapaxes", "movedim", "view_as", "t"),
}


def set_item(value: Tensor, index: Any, item: Any) -> Tensor:
    """`value[index] = item` on a copy."""
    result = value.clone()
    result[index] = item
    return result


def call_on_copy(method: str, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An in-place method without an out-of-place twin, run on a copy."""
    result: Tensor = getattr(value.clone(), method)(*args, **kwargs)
    return result


def functionalize(graph: fx.Graph, root: nn.Module) -> None:
    """Replace in-place operations on values, since a value may be shared by siblings.

    Later readers of the changed value read the result instead. Updates of buffers stay as they are:
    those are the model's state.

    Raises:
        TraceError: a view is changed in place and what it looks into is read afterwards.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = _in_place_target(node, root)
        if target is None or _stems_from_state(target):
            continue
        _check_aliases(target, node, order)
        _make_out_of_place(node)
        for reader in list(target.users):
            if order[reader] > order[node]:
                reader.replace_input_with(target, node)


def _in_place_target(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The value a node changes in place, if any."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        in_place = getattr(root.get_submodule(str(node.target)), "inplace", False)
    elif node.op == "call_method":
        name = str(node.target)
        in_place = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = (
            node.target in _IN_PLACE_OPERATORS
            or node.target is operator.setitem
            or _in_place_flag(node) is not None
            or (name.endswith("_") and not name.endswith("__"))
        )
    else:
        in_place = False
    return first if in_place else None


def _make_out_of_place(node: fx.Node) -> None:
    if node.op == "call_module":
        return  # the rewriter runs modules with their `inplace` flag off
    if node.op == "call_method":
        name = str(node.target)
        if hasattr(torch.Tensor, name[:-1]):
            node.target = name[:-1]
        else:
            node.op, node.target, node.args = "call_function", call_on_copy, (name, *node.args)
    elif node.target is operator.setitem:
        node.target = set_item
    elif node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
    elif (call := _in_place_flag(node)) is not None:
        call.arguments["inplace"] = False
        node.args, node.kwargs = call.args, call.kwargs
    else:
        name = getattr(node.target, "__name__", "")
        twin = getattr(torch, name[:-1], None) or getattr(nn.functional, name[:-1], None)
        if twin is None:
            raise TraceError(
                f"{name} changes a value in place and has no out-of-place twin.",
                next_step="Use the out-of-place operation in the model.",
            )
        node.target = twin


def _in_place_flag(node: fx.Node) -> inspect.BoundArguments | None:
    """The call's bound arguments if it sets `inplace=True`."""
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        call = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # builtins have no signature, and no such flag
        return None
    return call if call.arguments.get("inplace") is True else None


def _stems_from_state(node: fx.Node) -> bool:
    while _looks_into(node) is not None:
        node = _looks_into(node)  # type: ignore[assignment]
    return node.op == "get_attr"


def _looks_into(node: fx.Node) -> fx.Node | None:
    """The value a node is a view of, if it is one."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    is_view = node.op in ("call_method", "call_function") and name in _VIEWS
    source = node.args[0] if is_view and node.args else None
    return source if isinstance(source, fx.Node) else None


def _check_aliases(target: fx.Node, node: fx.Node, order: Mapping[fx.Node, int]) -> None:
    """Refuse to change a view of something that is read later, other than through the view."""
    source = _looks_into(target)
    while source is not None:
        late = [user for user in source.users if order[user] > order[node]]
        if late:
            raise TraceError(
                f"{node.name} changes {target.name} in place, a view of {source.name},"
                f" which {late[0].name} reads afterwards.",
                expected="in-place operations on values of their own",
                next_step="Use the out-of-place operation in the model.",
            )
        source = _looks_into(source)


def _batch_norm_macs(
    shape: torch.Size, *args: Any, out_val: Any = None, out_shape: Any = None
) -> int:
    """Twice what fvcore counts in evaluation mode, 2 per element; statistics count nothing."""
    training = args[4] if len(args) > 6 else False
    return 0 if training else 4 * shape.numel()


# Besides products, batch norms count, as they do for fvcore and so in the paper's figures.
_COUNTED = {
    torch.ops.aten.native_batch_norm: _batch_norm_macs,
    torch.ops.aten._native_batch_norm_legit_no_training: _batch_norm_macs,
}


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps each node's output shapes and MACs."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(root, graph))
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, int] = {}
        self.others: dict[fx.Node, Any] = {}
        self._counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)

    def record(self, example: Tensor, *, count: bool) -> None:
        """Run the graph; counting makes it take twice as long."""
        with self._counter if count else nullcontext():
            self.run(example)

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        value = super().run_node(n)
        self.macs[n] = (self._counter.get_total_flops() - before) // 2
        self.values[n] = tree_map(_shape, value)
        self.others[n] = tree_map(_number, value)
        return value


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _number(value: Any) -> Any:
    """What a value that is no tensor can be compared by."""
    if isinstance(value, Tensor):
        return ""
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, int) else str(value)


def _annotate(
    graph: fx.Graph, private: nn.Module, skeleton: nn.Module, example: Tensor, training: bool
) -> None:
    small, large = (_record(graph, private, skeleton, example, training, n) for n in _BATCHES)
    paths = _paths(graph)
    for node in graph.nodes:
        scope = _scope(node)
        node.meta["treeify"] = Facts(
            path=paths[node],
            scope=scope,
            value=tree_map(_merge, small.values[node], large.values[node], is_leaf=_is_leaf),
            grows=_growth(small.others[node], large.others[node]),
            macs=small.macs[node] // _BATCHES[0],
            rows=_follows_batch(small, large, node),
        )


def _follows_batch(small: _Recorder, large: _Recorder, node: fx.Node) -> bool:
    """Whether only dim 0 of tensors differs between the batch sizes, and no number does."""
    shapes = zip(
        *(tree_leaves(run.values[node], is_leaf=_is_leaf) for run in (small, large)), strict=True
    )
    same = all(
        one is None or other is None or one == other or _compare(one, other).batched
        for one, other in shapes
    )
    return same and small.others[node] == large.others[node]


def _record(
    graph: fx.Graph,
    private: nn.Module,
    skeleton: nn.Module,
    example: Tensor,
    training: bool,
    batch: int,
) -> _Recorder:
    failure: Exception | None = None
    # The meta device costs nothing; models that look at values while running need the real thing.
    for root, device in ((skeleton, "meta"), (private, example.device)):
        root = root if device == "meta" else copy.deepcopy(root)
        image = torch.zeros(batch, *example.shape[1:], dtype=example.dtype, device=device)
        with _mode(root, training), torch.no_grad():
            try:
                recorder = _Recorder(root, graph)
                recorder.record(image, count=batch == _BATCHES[0] and not training)
            except Exception as error:
                failure = error
            else:
                return recorder
    shape = f"[N, {', '.join(map(str, example.shape[1:]))}]"
    raise InputError(
        f"{type(private).__name__} does not run on an input of shape {shape}:"
        f" {str(failure).splitlines()[0]}",
        expected="an input shape the model accepts",
        next_step="Pass example_input=torch.zeros(1, C, H, W) of the right size (--input-size).",
    ) from failure


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, torch.Size)


def _merge(small: torch.Size | None, large: torch.Size | None) -> TensorFacts | None:
    return None if small is None or large is None else _compare(small, large)


def _compare(small: torch.Size, large: torch.Size) -> TensorFacts:
    """Merge the shapes seen at both batch sizes."""
    rest_fixed = small[1:] == large[1:]
    batched = bool(small) and (small[0], large[0]) == _BATCHES and rest_fixed
    differing = [
        dim for dim, sizes in enumerate(zip(small, large, strict=False)) if sizes[0] != sizes[1]
    ]
    same_rank = len(small) == len(large)
    dim = differing[0] if same_rank and len(differing) == 1 else None
    if dim is not None and not _grows_with_batch(small[dim], large[dim]):
        dim = None
    return TensorFacts(tuple(small), batched, dim)


def _grows_with_batch(small: int, large: int) -> bool:
    return small * _BATCHES[1] == large * _BATCHES[0]


def _growth(small: Any, large: Any) -> Any:
    """Where integers grow with the batch; None where a number differs in another way."""
    if isinstance(small, dict):
        found = {key: _growth(own, large[key]) for key, own in small.items()}
        return None if None in found.values() else found
    if isinstance(small, list | tuple):
        parts = [_growth(own, other) for own, other in zip(small, large, strict=True)]
        return None if None in parts else tuple(parts)
    if small == large:
        return False
    whole = type(small) is int and type(large) is int
    return True if whole and _grows_with_batch(small, large) else None


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    if node.op == "call_module":
        return str(node.target)
    return str(list(stack.values())[-1][0]) if stack else ""


def _paths(graph: fx.Graph) -> dict[fx.Node, str]:
    """Readable unique names: `layer1.0.conv1`, `layer1.0.add`, `layer1.0.relu_1` if repeated."""
    paths: dict[fx.Node, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        scope = _scope(node)
        if node.op in ("call_module", "get_attr", "placeholder", "output"):
            name = str(node.target)
        else:
            operation = getattr(node.target, "__name__", str(node.target)).strip("_")
            name = f"{scope}.{operation}" if scope else operation
        paths[node] = name if not seen[name] else f"{name}_{seen[name]}"
        seen[name] += 1
    return paths
