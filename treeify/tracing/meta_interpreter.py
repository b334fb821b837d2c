"""A base model run node by node, on the meta device where it can be: what each node gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from treeify.errors import InputError
from treeify.tracing.aliasing import Keeper, Values
from treeify.tracing.functionalize import in_place_target, is_isolating_copy, stems_from_state
from treeify.tracing.meta_kernels import MetaKernels, batch_norm_flops
from treeify.tracing.side_effects import (
    StateError,
    changed_number,
    numbers_within,
    undo_side_effects,
)
from treeify.tracing.sizes import BATCHES

_T = TypeVar("_T")


def _count_batch_norm(
    shape: torch.Size, *args: Any, out_val: Any = None, out_shape: Any = None
) -> int:
    return batch_norm_flops(shape, training=len(args) > 6 and args[4])


# Besides products, batch norms count, as they do for fvcore and so in the paper's figures.
_COUNTED = {
    torch.ops.aten.native_batch_norm: _count_batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training: _count_batch_norm,
}


class Recorder(fx.Interpreter):
    """Runs a graph and keeps each node's output shapes and MACs."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(root, graph))
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, int] = {}
        self.others: dict[fx.Node, Any] = {}
        # Calls that change inputs in place, though nothing about them says so.
        self.changing: dict[fx.Node, list[fx.Node]] = {}
        self._root = root
        self._counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
        self._shortcuts = MetaKernels()

    def record(self, example: Tensor, *, count: bool) -> None:
        """Run the graph; counting makes it take twice as long."""
        self._shortcuts.counting = count
        with self._counter if count else nullcontext(), self._shortcuts:
            self.run(example)

    @property
    def _flops(self) -> int:
        return self._counter.get_total_flops() + self._shortcuts.flops

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module.

        Raises:
            StateError: it, or one in it, counts its calls: branches cannot have a counter each.
        """
        module = self.fetch_attr(target)
        for _ in range(2):  # a size that is kept for the next call stays what it is then
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
        """Run a node as fx does, and note what it gives."""
        before = self._flops
        inputs = {
            source: self.env[source]
            for source in n.all_input_nodes
            if not (stems_from_state(source) or is_isolating_copy(source))
        }
        versions = {source: _version(value) for source, value in inputs.items()}
        value = super().run_node(n)
        changed = [own for own, tensor in inputs.items() if _version(tensor) != versions[own]]
        if changed and in_place_target(n, self._root) is None:
            self.changing[n] = changed
        self.macs[n] = (self._flops - before) // 2
        self.values[n] = tree_map(_shape, value)
        self.others[n] = tree_map(_number, value)
        return value


def _version(value: Any) -> int | None:
    """How often a tensor has been changed in place; None for what does not tell."""
    tells = isinstance(value, Tensor) and not value.is_inference()
    return int(value._version) if tells else None


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _number(value: Any) -> Any:
    """What a value that is no tensor can be compared by."""
    if isinstance(value, Tensor):
        return ""
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, int) else str(value)


@contextmanager
def _frozen(root: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: counting FLOPs fails on some views of those that do."""
    wanting = [parameter for parameter in root.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad = True


def _first_line(failure: Exception | None) -> str:
    """What an error says, or its kind if it says nothing; fx adds where it was."""
    first, *_ = str(failure).splitlines() or [""]
    kind = type(failure).__name__
    return kind if not first or first.startswith("While executing") else first


@dataclass(frozen=True)
class Running:
    """A model in one mode, to run graphs of.

    Args:
        private: with its weights.
        skeleton: on the meta device.
        example: an input of any batch size.
        training: the mode.
    """

    private: nn.Module
    skeleton: nn.Module
    example: Tensor
    training: bool

    def run(self, batch: int, action: Callable[[nn.Module, Tensor], _T]) -> _T:
        """Run something on a root and so many images, and undo what it leaves behind.

        Raises:
            InputError: the model does not run on the example's shape.
            StateError: a module counts its calls.
        """
        failure: Exception | None = None
        # The meta device costs nothing; models that look at values while running need the real
        # thing.
        for root, device in ((self.skeleton, "meta"), (self.private, self.example.device)):
            root = root if device == "meta" else copy.deepcopy(root)
            shape = (batch, *self.example.shape[1:])
            images = torch.zeros(shape, dtype=self.example.dtype, device=device)
            with undo_side_effects(root), torch.no_grad(), _frozen(root):
                root.train(self.training)
                try:
                    return action(root, images)
                except StateError:
                    raise
                except Exception as error:
                    failure = error
        text = f"[N, {', '.join(map(str, self.example.shape[1:]))}]"
        raise InputError(
            f"{type(self.private).__name__} does not run on an input of shape {text}:"
            f" {_first_line(failure)}",
            expected="an input shape the model accepts",
            next_step="Pass example_input=torch.zeros(1, C, H, W) of the right size"
            " (--input-size).",
        ) from failure

    def record(self, graph: fx.Graph, batch: int) -> Recorder:
        """What each node gives for so many images; MACs are counted where they are needed."""

        def action(root: nn.Module, images: Tensor) -> Recorder:
            recorder = Recorder(root, graph)
            recorder.record(images, count=batch == BATCHES[0] and not self.training)
            return recorder

        return self.run(batch, action)

    def values(self, graph: fx.Graph) -> Values:
        """Every node's value."""

        def action(root: nn.Module, images: Tensor) -> Values:
            keeper = Keeper(root, graph)
            keeper.run(images)
            return keeper.env

        return self.run(BATCHES[0], action)
