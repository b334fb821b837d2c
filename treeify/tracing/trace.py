"""Base model -> fx graphs, one for training and one for evaluation, with what each node computes.

Tracing freezes `self.training` into functional calls, so both modes get their own graph over the
same parameters. Every node is annotated with `Facts`: the module it stems from, the values it
produces (found by running the graph at two batch sizes on the meta device) and its MACs.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import SUPPORTED_NODES

from treeify.tracing.aliasing import Aliases, InPlaceError
from treeify.tracing.attempts import Limits, trace_modes
from treeify.tracing.facts import TensorFacts, annotate, enclosing, facts
from treeify.tracing.functionalize import (
    CONSTANT,
    functionalize,
    join_constants,
    reshape_views,
)
from treeify.tracing.meta_interpreter import Running
from treeify.tracing.model_copy import hooks_of, on_meta, private_copy, require_own_code
from treeify.tracing.sizes import Sizes


@dataclass(frozen=True)
class Traced:
    """A base model opened up.

    Args:
        skeleton: the base architecture on the meta device; graph targets refer to it.
        graphs: by mode, `False` for evaluation and `True` for training.
        example: shape of one input image, `(C, H, W)`.
        constants: by graph target, tensors that are neither parameters nor buffers.
        leaf_modules: modules whose insides stopped the tracer, by path, and what did so; each runs
            as one call.
        limits: what holds beyond the graphs' own inputs.
        hooked: modules whose hooks are left out.
    """

    skeleton: nn.Module
    graphs: Mapping[bool, fx.Graph]
    example: tuple[int, ...]
    constants: Mapping[str, Any]
    leaf_modules: Mapping[str, str]
    limits: Limits
    hooked: tuple[str, ...]

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
        leaf_modules: dict[str, str] = {}
        while True:
            graphs, limits = trace_modes(private, leaf_types, sizes, leaf_modules)
            try:
                for training, graph in graphs.items():
                    _prepare(graph, Running(private, skeleton, example, training))
                break
            except InPlaceError as error:
                _close_around(error, leaf_modules)
        constants = {
            target: value
            for graph in graphs.values()
            for target, value in _constants(graph, private).items()
        }
    for graph in graphs.values():  # they outlive the tracer and the copies that it ran
        graph._tracer_cls, graph.owning_module = None, None
    shape = tuple(example.shape[1:])
    hooked = tuple(path for path, module in model.named_modules() if hooks_of(module))
    return Traced(skeleton, graphs, shape, constants, leaf_modules, limits, hooked)


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
    annotate(graph, running, aliases)
    reshape_views(graph)
    _keep_single_images(graph)
    graph.lint()


def _close_around(error: InPlaceError, leaf_modules: dict[str, str]) -> None:
    """Let the innermost module with the operation stay closed: inside of it, it is as it was.

    Args:
        error: names the operation.
        leaf_modules: by module, why it stays closed; changed in place.

    Raises:
        InPlaceError: the given one, if the operation is in the model's own forward.
    """
    inside = enclosing(error.node)
    if not inside or inside in leaf_modules:
        raise error
    for nested in [path for path in leaf_modules if path.startswith(f"{inside}.")]:
        del leaf_modules[nested]
    leaf_modules[inside] = str(error).partition("\n")[0]


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
