"""Base model -> fx graphs, one for training and one for evaluation, with what each node computes.

Tracing freezes `self.training` into functional calls, so both modes get their own graph over the
same parameters. Every node is annotated with `Facts`: the module it stems from, the values it
produces (found by running the graph at two batch sizes on the meta device) and its MACs.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map

from treeify.tracing.aliasing import Aliases, InPlaceError
from treeify.tracing.functionalize import (
    CONSTANT,
    functionalize,
    isolate,
    join_constants,
    reshape_views,
)
from treeify.tracing.meta_interpreter import Recorder, Running
from treeify.tracing.model_copy import on_meta, private_copy, require_own_code
from treeify.tracing.tracer import BATCHES, Limits, Sizes, trace_modes


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
    def branch_dim(self) -> int:
        """The dim in which branches ride: 1 (`[N, G*C, ...]`), or a new dim 0 (`[G, ...]`)."""
        return 1 if self.batched and len(self.shape) >= 2 else 0

    @property
    def counts_images(self) -> bool:
        """Whether the dim that grows with the batch has one place per image, not several."""
        return self.batch_dim is not None and self.shape[self.batch_dim] == BATCHES[0]


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
        limits: what holds beyond the graphs' own inputs.
    """

    skeleton: nn.Module
    graphs: Mapping[bool, fx.Graph]
    example: tuple[int, ...]
    constants: Mapping[str, Any]
    unopened: Mapping[str, str]
    limits: Limits

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        """Itself: nothing ever changes it, so copies of an ensemble share it."""
        return self


def plain_tensors(traced: Traced) -> dict[str, Tensor]:
    """Attributes that the graphs read and that are tensors, but no parameters and no buffers."""
    return {
        name: own
        for name, own in traced.constants.items()
        if isinstance(own, Tensor) and not name.startswith(CONSTANT)
    }


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
        leaf_types: module types to keep whole, besides torch's own and those marked so for timm.

    Raises:
        TraceError: the model's own forward cannot be traced; names the line that stopped it, or the
            operation in place that no other can stand for.
        InputError: the model does not run on the example's shape.
    """
    require_own_code(model)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        private = private_copy(model)
        skeleton = on_meta(private)
        sizes = Sizes(private, skeleton, tuple(example.shape[1:]))
        unopened: dict[str, str] = {}
        while True:
            graphs, limits = trace_modes(private, leaf_types, sizes, unopened)
            try:
                for training, graph in graphs.items():
                    _prepare(graph, Running(private, skeleton, example, training))
                break
            except InPlaceError as error:
                _close_around(error, unopened)
        constants = {
            target: value
            for graph in graphs.values()
            for target, value in _constants(graph, private).items()
        }
    for graph in graphs.values():  # they outlive the tracer and the copies that it ran
        graph._tracer_cls, graph.owning_module = None, None
    shape = tuple(example.shape[1:])
    return Traced(skeleton, graphs, shape, constants, unopened, limits)


def _prepare(graph: fx.Graph, running: Running) -> None:
    """Make a traced graph functional, and annotate its nodes.

    Args:
        graph: changed in place.
        running: the model in the graph's mode.

    Raises:
        InPlaceError: an operation in place that no other can stand for.
        InputError: the model does not run on the example's shape.
    """
    _register_dataclasses(graph)
    _give_by_position(graph, running.private)
    join_constants(graph)
    aliases = Aliases(running.private, partial(running.values, graph))
    functionalize(graph, running.private, aliases)
    _annotate(graph, running, aliases)
    reshape_views(graph)
    _keep_single_images(graph)
    graph.lint()


def _close_around(error: InPlaceError, unopened: dict[str, str]) -> None:
    """Let the innermost module with the operation stay closed: inside of it, it is as it was.

    Args:
        error: names the operation.
        unopened: by module, why it stays closed; changed in place.

    Raises:
        InPlaceError: the given one, if the operation is in the model's own forward.
    """
    inside = _enclosing(error.node)
    if not inside or inside in unopened:
        raise error
    for nested in [path for path in unopened if path.startswith(f"{inside}.")]:
        del unopened[nested]
    unopened[inside] = str(error).partition("\n")[0]


def _keep_single_images(graph: fx.Graph) -> None:
    """Let `squeeze()` drop the dims it drops of several images, and not the batch of one image."""
    for node in graph.nodes:
        if node.target in ("squeeze", torch.squeeze) and len(node.args) == 1 and not node.kwargs:
            known = facts(node.args[0]).value
            if isinstance(known, TensorFacts) and known.batch_dim is not None:
                dims = tuple(dim for dim, size in enumerate(known.shape) if size == 1)
                node.args = (node.args[0], dims)


def _register_dataclasses(graph: fx.Graph) -> None:
    """Let torch look into the dataclasses that the model returns, as it does into dicts."""
    for node in graph.nodes:
        kind = node.target
        if isinstance(kind, type) and is_dataclass(kind) and kind not in SUPPORTED_NODES:
            torch.export.register_dataclass(kind)


# The first argument of torch's functions where that is not called `input`.
_FIRST = {torch.where: "condition", torch.searchsorted: "sorted_sequence"}


def _give_by_position(graph: fx.Graph, root: nn.Module) -> None:
    """Let calls have their first argument in its place, as `module(input=x)` has not."""
    for node in graph.nodes:
        if node.args or not node.kwargs:
            continue
        if node.op == "call_module":
            forward = inspect.signature(root.get_submodule(str(node.target)).forward)
            first = next(iter(forward.parameters))
        elif node.op == "call_function" and _is_torchs(node.target):
            first = _FIRST.get(node.target, "input")
        else:
            continue
        if first in node.kwargs:
            node.args = (node.kwargs[first],)
            node.kwargs = {key: own for key, own in node.kwargs.items() if key != first}


def _is_torchs(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "torch").partition(".")[0] == "torch"


def _constants(graph: fx.Graph, private: nn.Module) -> dict[str, Any]:
    """Values the graph reads that are neither parameters nor buffers, left behind by tracing."""
    state = {name for name, _ in (*private.named_parameters(), *private.named_buffers())}
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - state
    return {target: operator.attrgetter(target)(private) for target in targets}


def _annotate(graph: fx.Graph, model: Running, aliases: Aliases) -> None:
    small, large = (model.record(graph, batch) for batch in BATCHES)
    if small.changing:
        isolate(graph, small.changing, aliases)
        _annotate(graph, model, aliases)
        return
    paths = _paths(graph)
    for node in graph.nodes:
        scope = _scope(node)
        node.meta["treeify"] = Facts(
            path=paths[node],
            scope=scope,
            value=tree_map(_merge, small.values[node], large.values[node], is_leaf=_is_leaf),
            grows=_growth(small.others[node], large.others[node]),
            macs=small.macs[node] // BATCHES[0],
            rows=_follows_batch(small, large, node),
        )


def _follows_batch(small: Recorder, large: Recorder, node: fx.Node) -> bool:
    """Whether only dim 0 of tensors differs between the batch sizes, and no number does."""
    shapes = zip(
        *(tree_leaves(run.values[node], is_leaf=_is_leaf) for run in (small, large)), strict=True
    )
    same = all(
        one is None or other is None or one == other or _compare(one, other).batched
        for one, other in shapes
    )
    return same and small.others[node] == large.others[node]


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, torch.Size)


def _merge(small: torch.Size | None, large: torch.Size | None) -> TensorFacts | None:
    return None if small is None or large is None else _compare(small, large)


def _compare(small: torch.Size, large: torch.Size) -> TensorFacts:
    """Merge the shapes seen at both batch sizes."""
    rest_fixed = small[1:] == large[1:]
    batched = bool(small) and (small[0], large[0]) == BATCHES and rest_fixed
    differing = [
        dim for dim, sizes in enumerate(zip(small, large, strict=False)) if sizes[0] != sizes[1]
    ]
    same_rank = len(small) == len(large)
    dim = differing[0] if same_rank and len(differing) == 1 else None
    if dim is not None and not _grows_with_batch(small[dim], large[dim]):
        dim = None
    return TensorFacts(tuple(small), batched, dim)


def _grows_with_batch(small: int, large: int) -> bool:
    return small * BATCHES[1] == large * BATCHES[0]


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
    return str(node.target) if node.op == "call_module" else _enclosing(node)


def _enclosing(node: fx.Node) -> str:
    """The innermost module whose forward has the node's line; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    called = node.target if node.op == "call_module" else None
    return next((str(path) for path, _ in reversed(stack.values()) if path != called), "")


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
