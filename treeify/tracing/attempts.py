"""A model -> its fx graphs, traced as deep as it can be.

Tracing is tried with the images' size unknown, then with the sizes of an example, on which some
models' control flow depends. A module whose inside stops the tracer even so becomes a leaf module.
"""

import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

from treeify.errors import TraceError
from treeify.tracing.proxies import proxies_are_tensors, recorded_factories
from treeify.tracing.side_effects import (
    ReadTensors,
    Snapshot,
    StateError,
    refuse_autograd_functions,
    version,
)
from treeify.tracing.sizes import Sizes
from treeify.tracing.tracer import Tracer


@dataclass(frozen=True)
class Limits:
    """What holds beyond the graphs' own inputs.

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
    """How an attempt ended: after so many nodes, inside a module (empty for the model itself)."""

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


@dataclass(frozen=True)
class Attempts:
    """Attempts at tracing a model, each with one more module left as it is.

    `leaf_modules` says by path which modules have to be one call, and why; more are added.
    """

    model: nn.Module
    leaf_types: frozenset[type[nn.Module]]
    sizes: Sizes
    leaf_modules: dict[str, str]

    def trace(self) -> tuple[dict[bool, fx.Graph], Limits]:
        """The graphs of evaluation and of training, and what they are limited to."""
        while True:
            before = len(self.leaf_modules)
            results = {training: self._trace_mode(training) for training in (False, True)}
            # What stops the tracer in training is a leaf module in evaluation too, or the modes
            # would name different modules: a split there would fit one of them only.
            if len(self.leaf_modules) > before:
                continue
            limits = [limits for _, limits in results.values()]
            return {training: graph for training, (graph, _) in results.items()}, Limits(
                one_size=any(mode.one_size for mode in limits),
                fixed=tuple(sorted({name for mode in limits for name in mode.fixed})),
                recomputed=any(mode.recomputed for mode in limits),
                assigned=tuple(sorted({name for mode in limits for name in mode.assigned})),
            )

    def _trace_mode(self, training: bool) -> tuple[fx.Graph, Limits]:
        """One mode's graph, and what it is limited to; what stops the tracer is a leaf module."""
        while True:
            stops = []
            # Unknown sizes first: such a graph takes images of any size. A model that branches on
            # sizes can only be traced with those of the example's images.
            for known_sizes in (False, True):
                try:
                    result = self._attempt(training, known_sizes=known_sizes)
                except StateError as error:
                    raise self._untraceable(training, error) from error
                if not isinstance(result, _Stop):
                    return result
                stops.append(result)
            # Of two obstacles the later one: the other attempt has got around the first.
            stop = max(stops, key=lambda stop: stop.nodes)
            if not stop.inside or stop.inside in self.leaf_modules:
                raise self._untraceable(training, stop.error) from stop.error
            self.leaf_modules[stop.inside] = stop.reason

    def _attempt(self, training: bool, *, known_sizes: bool) -> tuple[fx.Graph, Limits] | _Stop:
        """A mode's graph and limits, with the images' size unknown or known; or what stopped it.

        Buffers are values of the graph, which keeps their in-place updates. One that decides what
        the model does (a counter, a flag) has its present value instead.

        Raises:
            StateError: a module has a state that branches cannot have one each of.
        """
        versions = {id(buffer): version(buffer) for buffer in self.model.buffers()}
        fixed: set[str] = set()
        while True:
            ids = {id(self.model.get_buffer(name)) for name in fixed}
            tracer = Tracer(
                self.leaf_types, self.leaf_modules, self.sizes, ids, known_sizes=known_sizes
            )
            with (
                self.sizes.new_pass(training),
                recorded_factories(),
                proxies_are_tensors(),
                ReadTensors(tracer.read),
                refuse_autograd_functions() as left_out,
            ):
                before = Snapshot(self.model)
                try:
                    graph = tracer.trace(self.model)
                    tracer.check_side_effects(before, "")
                except StateError:
                    raise
                except Exception as error:
                    deciding = _deciding_buffers(tracer.graph, self.model) - fixed
                    if not deciding:
                        return _Stop(len(tracer.graph.nodes), tracer.stopped_in, error)
                    fixed |= deciding
                    continue
                assigned = _assigned_buffer(self.model, versions)
                if assigned is not None:
                    path, name = assigned
                    problem = TraceError(f"it assigns to its buffer {name!r}, which no graph shows")
                    # It got to the end, further than any attempt that did not.
                    return _Stop(sys.maxsize, path, problem)
                recomputed = tracer.recomputed or bool(left_out)
                return graph, Limits(known_sizes, tuple(fixed), recomputed, tuple(tracer.assigned))

    def _untraceable(self, training: bool, failure: Exception) -> TraceError:
        """What is told of a model whose own forward stops the tracer."""
        ours = isinstance(failure, TraceError)
        return TraceError(
            f"{type(self.model).__name__} cannot be traced in {'training' if training else 'eval'}"
            f" mode: {failure if ours else f'{type(failure).__name__}: {failure}'}",
            expected="a forward pass whose effects are all seen in its tensors"
            if ours
            else "a forward pass whose control flow does not depend on tensor values",
            found=f"stopped at {_user_line(failure)}",
            next_step="Keep it in a buffer, or set it outside of forward."
            if isinstance(failure, StateError)
            else "Move that line into a module of its own: it then runs as one call per branch.",
        )


def _deciding_buffers(graph: fx.Graph, model: nn.Module) -> set[str]:
    """The buffers that the last value of a graph was computed from, if from nothing else.

    It is what a truth value or a number was asked of when the tracer stopped.
    """
    buffers = {name for name, _ in model.named_buffers()}
    deciding, pending = set(), [next(reversed(graph.nodes))] if len(graph.nodes) else []
    while pending:
        node = pending.pop()
        if node.op == "get_attr" and str(node.target) in buffers:
            deciding.add(str(node.target))
        elif node.op not in ("call_method", "call_function"):
            return set()
        pending += node.all_input_nodes
    return deciding


def _assigned_buffer(
    model: nn.Module, versions: Mapping[int, int | None]
) -> tuple[str, str] | None:
    """A module and its buffer that a traced pass has assigned to, as `self.steps += 1` does.

    `versions` has, by their ids, how often the buffers had been changed before. Caches, which no
    state dict has, do not count: each pass makes its own.
    """
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            if id(buffer) not in versions or version(buffer) != versions[id(buffer)]:
                return path, name
    return None


def _user_line(error: BaseException, *, imported: bool = False) -> str:
    """The innermost line of the traceback that belongs neither to torch nor to the tracer.

    Its file's full path, or that below the folder it was imported from: the same on any machine.
    """
    ignored = (*(str(Path(file).parent) for file in (torch.__file__, __file__)), "<")
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(ignored)]
    if not users:
        return "an unknown line"
    frame = users[-1]
    file = _below_imports(Path(frame.filename)) if imported else frame.filename
    return f"{file}:{frame.lineno} in {frame.name}: {frame.line}"


def _below_imports(file: Path) -> Path:
    """A file's path below the folder it was imported from."""
    folders = (folder for folder in map(Path, sys.path) if folder in file.parents)
    innermost = max(folders, key=lambda folder: len(folder.parts), default=None)
    return file if innermost is None else file.relative_to(innermost)
