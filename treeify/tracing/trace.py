"""A base model -> fx graphs, one for training and one for evaluation, with facts on every node.

Tracing freezes `self.training` into functional calls, so both modes get their own graph over the
same parameters.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from treeify.errors import InputError
from treeify.tracing.aliasing import Aliases, InPlaceError, is_library
from treeify.tracing.attempts import Attempts, Limits
from treeify.tracing.facts import TensorFacts, annotate, enclosing, facts
from treeify.tracing.functionalize import CONSTANT, functionalize, join_constants, reshape_views
from treeify.tracing.hooks import changing_hooks, hooks_in, leave_hooks, without_global_hooks
from treeify.tracing.meta_interpreter import GraphRunner
from treeify.tracing.model_copy import copy_model, meta_copy, private_copy, require_copyable
from treeify.tracing.sizes import BATCHES, Sizes

# fx patches `nn.Module` itself: of two that trace at once, one would leave its patches behind.
_ALONE = threading.RLock()


@dataclass(frozen=True)
class Traced:
    """A base model's graphs.

    Args:
        skeleton: the base architecture on the meta device; graph targets refer to it.
        graphs: by mode, `False` for evaluation and `True` for training.
        example: shape of one input image, `(C, H, W)`.
        constants: by graph target, tensors that are neither parameters nor buffers.
        leaf_modules: modules whose insides stopped the tracer, by path, and what did so; each runs
            as one call.
        limits: what holds beyond the graphs' own inputs.
        hooked: modules whose hooks are left out, since they observe.
        changed_by_hooks: modules that keep a hook, since it changes what they compute.
        batch: the example's, where the model does not take any: multiples of it were tried.
    """

    skeleton: nn.Module
    graphs: Mapping[bool, fx.Graph]
    example: tuple[int, ...]
    constants: Mapping[str, Any]
    leaf_modules: Mapping[str, str]
    limits: Limits
    hooked: tuple[str, ...]
    changed_by_hooks: tuple[str, ...]
    batch: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        """Itself: nothing ever changes it, so copies of an ensemble share it."""
        return self


def plain_tensors(traced: Traced) -> dict[str, Tensor]:
    """Attributes that the graphs read and that are tensors, but no parameters and no buffers."""
    return {
        name: value
        for name, value in traced.constants.items()
        if isinstance(value, Tensor) and not name.startswith(CONSTANT)
    }


def trace(
    model: nn.Module, example: Tensor, leaf_types: frozenset[type[nn.Module]] = frozenset()
) -> Traced:
    """Trace a classifier in both modes and annotate every node.

    A model whose control flow depends on the images' size is traced for the example's. A module
    whose inside cannot be traced even so (control flow that depends on tensor values) is one call
    of the graphs; all the others are traced into.

    Args:
        model: the base model, `[N, C, H, W] -> [N, K]`. Not modified.
        example: an input of a batch size that the model takes; only its shape and dtype matter,
            and its values where there are hooks.
        leaf_types: module types that are one call, besides torch's and those marked so for timm.

    Raises:
        TraceError: the model's own forward cannot be traced; names the line that stopped it, or the
            operation in place that no other can stand for.
        InputError: the model does not run on the example's shape.
    """
    require_copyable(model)
    image = tuple(example.shape[1:])
    with _ALONE, torch.random.fork_rng(devices=[]), torch.enable_grad():
        private = private_copy(model)
        changing = changing_hooks(private, example, copy_model)
        leave_hooks(private, changing)
        skeleton = meta_copy(private)
        leaf_modules = {
            str(hook.path): f"its hook {hook.name} changes what it computes" for hook in changing
        }
        batches, batch = BATCHES, len(example)
        while True:
            sizes = Sizes(private, skeleton, image, batches)
            attempts = Attempts(private, leaf_types, sizes, dict(leaf_modules))
            runners = {
                training: GraphRunner(private, skeleton, example, training, batches)
                for training in (False, True)
            }
            try:
                graphs, limits = _annotated(attempts, runners)
                break
            except InputError:
                if batch == 1 or batches != BATCHES:
                    raise
            # A model may take clips of several images: it does take the example's.
            batches = (BATCHES[0] * batch, BATCHES[1] * batch)
        constants = _constants(graphs.values(), private)
    for graph in graphs.values():  # they outlive the tracer and the copies that it ran
        graph._tracer_cls, graph.owning_module = None, None
    left_out = [hook for hook in hooks_in(model) if hook not in changing and not hook.is_torchs]
    return Traced(
        skeleton,
        graphs,
        image,
        constants,
        leaf_modules=attempts.leaf_modules,
        limits=limits,
        hooked=tuple(dict.fromkeys(str(hook.path) for hook in left_out)),
        changed_by_hooks=tuple(dict.fromkeys(str(hook.path) for hook in changing)),
        batch=1 if batches == BATCHES else batch,
    )


def _annotated(
    attempts: Attempts, runners: Mapping[bool, GraphRunner]
) -> tuple[dict[bool, fx.Graph], Limits]:
    """A model's graphs, functional and annotated, with as few leaf modules as can be."""
    while True:
        with without_global_hooks():
            graphs, limits = attempts.trace()
        try:
            for training, graph in graphs.items():
                _prepare(graph, runners[training])
            return graphs, limits
        except InPlaceError as error:
            _add_leaf_module(error, attempts.leaf_modules)


def _prepare(graph: fx.Graph, runner: GraphRunner) -> None:
    """Make a traced graph functional, and annotate its nodes."""
    _pass_first_by_position(graph, runner.model)
    join_constants(graph)
    # The order matters: facts are of values that nothing changes any more, and whether a view may
    # become a copy is known only then.
    aliases = Aliases(runner.model, partial(runner.values, graph))
    functionalize(graph, runner.model, aliases)
    annotate(graph, runner, aliases)
    reshape_views(graph)
    _keep_single_images(graph)
    graph.lint()


def _add_leaf_module(error: InPlaceError, leaf_modules: dict[str, str]) -> None:
    """Let the innermost module with the operation be one call: inside it, nothing is replaced."""
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
            tensor = facts(node.args[0]).value
            if isinstance(tensor, TensorFacts) and tensor.batch_dim is not None:
                dims = tuple(dim for dim, size in enumerate(tensor.shape) if size == 1)
                node.args = (node.args[0], dims)


# The first argument of torch's functions where that is not called `input`.
_FIRST = {torch.where: "condition", torch.searchsorted: "sorted_sequence"}


def _pass_first_by_position(graph: fx.Graph, root: nn.Module) -> None:
    """Let calls have their first argument in its place, as `module(input=x)` has not.

    Rules look for the tensor there.
    """
    for node in graph.nodes:
        if node.args or not node.kwargs:
            continue
        if node.op == "call_module":
            forward = inspect.signature(root.get_submodule(str(node.target)).forward)
            first = next(iter(forward.parameters))
        elif node.op == "call_function" and is_library(node.target):
            first = _FIRST.get(node.target, "input")
        else:
            continue
        if first in node.kwargs:
            node.args = (node.kwargs[first],)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != first}


def _constants(graphs: Iterable[fx.Graph], private: nn.Module) -> dict[str, Any]:
    """Values the graphs read that are neither parameters nor buffers, left behind by tracing."""
    state = {name for name, _ in (*private.named_parameters(), *private.named_buffers())}
    nodes = (node for graph in graphs for node in graph.nodes if node.op == "get_attr")
    targets = {str(node.target) for node in nodes} - state
    return {target: operator.attrgetter(target)(private) for target in sorted(targets)}
