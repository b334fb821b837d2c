"""A base model run node by node, on the meta device where it can be: what each node gives."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from treeify.errors import InputError
from treeify.tracing.aliasing import Values
from treeify.tracing.functionalize import in_place_target, is_isolating_copy, stems_from_state
from treeify.tracing.mac_counter import MacCounter, frozen_parameters
from treeify.tracing.meta_kernels import MetaKernels
from treeify.tracing.side_effects import (
    StateError,
    changed_number,
    numbers_within,
    undo_side_effects,
    version,
)
from treeify.tracing.sizes import BATCHES
from treeify.tracing.structures import mutable, register_structures

_Interpreter = TypeVar("_Interpreter", bound=fx.Interpreter)


class RecordingInterpreter(fx.Interpreter):
    """Runs a graph on the module its targets name, and records what each node gives and costs.

    Counting what it costs makes it take twice as long.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, *, count: bool) -> None:
        super().__init__(root, graph=graph)
        # Each node's output, with shapes for tensors, and with what else can be compared.
        self.shapes: dict[fx.Node, Any] = {}
        self.others: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, int] = {}
        # Calls that change inputs in place, though nothing about them says so.
        self.mutating_calls: dict[fx.Node, list[fx.Node]] = {}
        self._counter = MacCounter()
        self._kernels = self._counter if count else MetaKernels()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as fx does."""
        with self._kernels:
            return super().run(*args, **kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """A node's arguments in the types that the model's code has."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return mutable(args), {key: mutable(value) for key, value in kwargs.items()}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module, and refuse one that counts its calls: branches have no counter each."""
        module = self.fetch_attr(target)
        # Twice: a size remembered from the first call is the same at the second, a count is not.
        for _ in range(2):
            before = numbers_within(module)
            value = super().call_module(target, args, kwargs)
            changed = changed_number(before, numbers_within(module))
            if changed is None:
                return value
        raise StateError(
            f"{target} changes its attribute {changed!r} at every call.",
            expected="no state but in buffers, of which every branch has one",
            next_step="Keep it in a buffer, or set it outside of forward.",
        )

    def run_node(self, n: fx.Node) -> Any:
        """Run a node as fx does, and record what it gives."""
        macs = self._counter.macs
        # State is every branch's own, and a copy is there to be changed.
        inputs = {
            source: self.env[source]
            for source in n.all_input_nodes
            if not (stems_from_state(source) or is_isolating_copy(source))
        }
        versions = {source: version(value) for source, value in inputs.items()}
        value = super().run_node(n)
        register_structures(value)
        mutated = [source for source in inputs if version(inputs[source]) != versions[source]]
        if mutated and in_place_target(n, self.module) is None:
            self.mutating_calls[n] = mutated
        self.macs[n] = self._counter.macs - macs
        self.shapes[n] = tree_map(_shape, value)
        self.others[n] = tree_map(_comparable, value)
        return value


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _comparable(value: Any) -> Any:
    """What an output that is no tensor is compared by between runs."""
    if isinstance(value, Tensor):
        return ""
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, int) else str(value)


def _first_line(failure: Exception | None) -> str:
    """What an error says, or its kind if it says nothing; fx adds where it was."""
    first, *_ = str(failure).splitlines() or [""]
    kind = type(failure).__name__
    return kind if not first or first.startswith("While executing") else first


@dataclass(frozen=True)
class GraphRunner:
    """Runs graphs of a model in one mode, on its `skeleton` (on the meta device) or on itself.

    Of `example` only the device, the dtype and the shape of an image matter. `batches` are how many
    images it is run on, to compare what it gives.
    """

    model: nn.Module
    skeleton: nn.Module
    example: Tensor
    training: bool
    batches: tuple[int, int] = BATCHES

    def _run(self, batch: int, interpreter_of: Callable[[nn.Module], _Interpreter]) -> _Interpreter:
        """Run the interpreter of a root on so many images, and undo what it leaves behind there."""
        image = self.example.shape[1:]
        failure: Exception | None = None
        # The meta device costs next to nothing; models that look at values while they run, or that
        # use what it has not, need a real one.
        for device in ("meta", self.example.device):
            root = self.skeleton if device == "meta" else copy.deepcopy(self.model)
            images = torch.zeros(batch, *image, dtype=self.example.dtype, device=device)
            with undo_side_effects(root), torch.no_grad(), frozen_parameters(root):
                root.train(self.training)
                try:
                    interpreter = interpreter_of(root)
                    interpreter.run(images)
                    return interpreter
                except StateError:
                    raise
                except Exception as error:
                    failure = error
        raise InputError(
            f"{type(self.model).__name__} does not run on an input of shape"
            f" [N, {', '.join(map(str, image))}] with N = {batch}: {_first_line(failure)}",
            expected="an input shape the model accepts",
            next_step="Pass example_input=torch.zeros(N, C, H, W) of the right size (--input-size);"
            " N other than 1 where the model takes no other than multiples of it.",
        ) from failure

    def record(self, graph: fx.Graph, batch: int) -> RecordingInterpreter:
        """What each node gives for so many images; MACs are counted where they are needed."""
        count = batch == self.batches[0] and not self.training
        return self._run(batch, partial(RecordingInterpreter, graph=graph, count=count))

    def values(self, graph: fx.Graph) -> Values:
        """Every node's value, all kept to the end: so no two lie in one place by chance."""
        keeping = partial(fx.Interpreter, garbage_collect_values=False, graph=graph)
        return self._run(self.batches[0], keeping).env
