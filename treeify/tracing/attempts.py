"""A model -> its fx graphs, opened as deep as tracing goes.

Tracing is tried with the images' size unknown, then with the sizes of an example, on which some
models' control flow depends. A module whose inside stops the tracer even so stays closed.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

from treeify.errors import TraceError
from treeify.tracing.proxies import Value, instances_told, recorded_factories
from treeify.tracing.side_effects import StateError, Watch, changes, closed_functions
from treeify.tracing.sizes import Sizes
from treeify.tracing.tracer import Tracer


def trace_modes(
    private: nn.Module,
    leaf_types: frozenset[type[nn.Module]],
    sizes: Sizes,
    leaf_modules: dict[str, str],
) -> tuple[dict[bool, fx.Graph], Limits]:
    """Both modes' graphs, and what they are limited to.

    Args:
        private: the model.
        leaf_types: module types to keep whole.
        sizes: answers to what the model asks about sizes.
        leaf_modules: by module that runs as one call, the reason; those that have to, in either
            mode, are added.

    Raises:
        TraceError: the model's own forward cannot be traced.
    """
    while True:
        before = len(leaf_modules)
        found = {
            training: _trace_mode(private, training, leaf_types, leaf_modules, sizes)
            for training in (False, True)
        }
        if len(leaf_modules) == before:
            graphs = {training: graph for training, (graph, _) in found.items()}
            limits = [own for _, own in found.values()]
            fixed = sorted({name for own in limits for name in own.fixed})
            one_size = any(own.one_size for own in limits)
            recomputed = any(own.recomputed for own in limits)
            assigned = sorted({name for own in limits for name in own.assigned})
            return graphs, Limits(one_size, tuple(fixed), recomputed, tuple(assigned))


@dataclass(frozen=True)
class Limits:
    """What holds beyond the graph's own inputs.

    Args:
        one_size: images must have the example's height and width, since what the model does depends
            on them.
        fixed: buffers whose present values decide what the model does.
        recomputed: whether activations were to be computed again in the backward pass.
        assigned: attributes in which modules put values, and which held none before.
    """

    one_size: bool
    fixed: tuple[str, ...]
    recomputed: bool
    assigned: tuple[str, ...]


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
    leaf_modules: dict[str, str],
    sizes: Sizes,
) -> tuple[fx.Graph, Limits]:
    """One mode's graph, and what it is limited to; what stops the tracer is left closed."""
    while True:
        # A model that branches on sizes can only be traced with those of the example's images.
        stops: list[_Stop] = []
        for sized in (False, True):
            try:
                found = _try(private, training, leaf_types, leaf_modules, sizes, stops, sized=sized)
            except StateError as error:
                raise _untraceable(private, training, error) from error
            if found is not None:
                return found
        furthest = max(stops, key=lambda stop: stop.nodes)
        if not furthest.inside or furthest.inside in leaf_modules:
            raise _untraceable(private, training, furthest.error) from furthest.error
        leaf_modules[furthest.inside] = furthest.reason


def _try(
    private: nn.Module,
    training: bool,
    leaf_types: frozenset[type[nn.Module]],
    leaf_modules: Collection[str],
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
    buffers = {id(buffer): changes(buffer) for buffer in private.buffers()}
    fixed: set[str] = set()
    while True:
        ids = {id(private.get_buffer(name)) for name in fixed}
        tracer = Tracer(leaf_types, leaf_modules, sizes, ids, sized=sized)
        with (
            sizes.mode(training),
            recorded_factories(),
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
                return graph, Limits(sized, tuple(fixed), recomputed, tuple(tracer.assigned))
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
            if id(buffer) not in before or changes(buffer) != before[id(buffer)]:
                return path, name
    return None


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
        else "Move that line into a module of its own: it then runs as one call per branch.",
    )


# Their lines say nothing about where in the user's code tracing stopped.
_TRACER_FILES = (__file__, *map(inspect.getfile, (Tracer, Sizes, Value, Watch)))


def _user_line(error: BaseException, *, imported: bool = False) -> str:
    """The innermost line of the traceback that belongs neither to torch nor to the tracer.

    Its file's whole path, or that below the folder it was imported from: the same on any machine.
    """
    torch_root = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_root, *_TRACER_FILES, "<"))
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
