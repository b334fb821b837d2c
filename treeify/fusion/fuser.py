"""A program's segments with what follows each layer fused into it, for evaluation."""

import copy
import operator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import timm.layers.activations as timm_act
import torch
import torch.nn.functional as F
from timm.layers.linear import Linear as TimmLinear
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn

from treeify.engine.program import Program, Segment
from treeify.fusion import (
    CONVOLUTIONS,
    Activation,
    AddInto,
    FusedConv,
    FusedLinear,
    Overwrite,
    Prepared,
    packed_module,
)
from treeify.rules.dropout import DROPOUTS
from treeify.rules.elementwise import ACTIVATIONS
from treeify.rules.operations.broadcast import Broadcast
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.linear import PackedLinear
from treeify.rules.operations.norm import NormInBatch, PackedLayerNorm
from treeify.rules.operations.packed import PackedStochasticDepth
from treeify.rules.operations.widened import Widened

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
_LINEAR = (nn.Linear, TimmLinear, PackedLinear)
_ADDITIONS = (operator.add, torch.add, "add")
# Operations whose result is a new tensor, of which no other value is a view: overwriting it changes
# nothing that the tree still needs.
_FRESH = (nn.LayerNorm, PackedLayerNorm, NormInBatch, *CONVOLUTIONS, *_NORMS)
_ARITHMETIC = (*_ADDITIONS, operator.mul, torch.mul, "mul", operator.sub, torch.sub, "sub")

_RELU = Activation(torch.relu_, "relu")
_RELU6 = Activation(partial(F.relu6, inplace=True), "hardtanh", [0.0, 6.0])
_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), _RELU),
    F.relu6: _RELU6,
    F.silu: Activation(partial(F.silu, inplace=True)),
    F.hardswish: Activation(partial(F.hardswish, inplace=True)),
    F.gelu: Activation(torch.ops.aten.gelu_, "gelu", [], "none"),
}


class FusedTwin:
    """A program's twin with batch norms folded and sums and activations written in place."""

    def __init__(self, source: Program) -> None:
        self.source = source
        self._dropouts: list[nn.Module] = []

    @cached_property
    def program(self) -> Program:
        """The twin, made when first asked for."""
        fusers = [_SegmentFuser(segment) for segment in self.source.segments]
        segments = tuple(fuser.run() for fuser in fusers)
        self._dropouts = [dropout for fuser in fusers for dropout in fuser.dropouts]
        return replace(self.source, segments=segments)

    def usable(self) -> Program:
        """The twin; the program itself while a dropout that the twin leaves out is switched on."""
        twin = self.program
        return self.source if any(dropout.training for dropout in self._dropouts) else twin

    def forget(self) -> None:
        """Drop prepared weights: they may be about to change unnoticed."""
        if "program" in self.__dict__:
            for segment in self.program.segments:
                for module in segment.module.modules():
                    if isinstance(module, Prepared):
                        module.forget()


class _SegmentFuser:
    """Rewrites one segment: every step goes over all nodes before the next begins.

    Sums come after layers, so that a sum finds the fused convolution that is to compute it; what is
    left of the activations comes last.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.modules: dict[str, nn.Module] = dict(segment.module._modules)  # type: ignore[arg-type]
        self.graph = copy.deepcopy(segment.module.graph)
        self.span = next(iter(self.graph.nodes))
        self.erased: set[fx.Node] = set()
        self.dropouts: list[nn.Module] = []

    def run(self) -> Segment:
        steps = (self._skip, self._fuse_convolution, self._fuse_linear, self._fuse_addition)
        for fuse_at in (*steps, self._fuse_activation):
            # Backwards, so that what is erased behind a node has been visited before.
            for node in reversed(list(self.graph.nodes)):
                if node not in self.erased:
                    fuse_at(node)
        self.graph.lint()
        name = f"Level{self.segment.level}"
        return replace(self.segment, module=fx.GraphModule(self.modules, self.graph, name))

    def _skip(self, node: fx.Node) -> None:
        """Leave out what gives its input back in evaluation mode."""
        operation, x = self._single(node), node.args[-1] if node.args else None
        if not isinstance(x, fx.Node):
            return
        if type(operation) in DROPOUTS:
            self.dropouts.append(operation)  # type: ignore[arg-type]
        elif type(operation) is not nn.Identity:
            return
        node.replace_all_uses_with(x)
        self._erase(node)

    def _fuse_linear(self, node: fx.Node) -> None:
        """A linear layer, with its activation if that alone reads it."""
        operation = self._operation(node)
        has_span = isinstance(operation, PackedLinear)
        if type(operation) in _LINEAR and len(node.args) == 1 + has_span and not node.kwargs:
            assert operation is not None
            last, activation = self._activation_after(node)
            self._replace(last, FusedLinear(operation, activation), (self.span, node.args[-1]))

    def _fuse_convolution(self, node: fx.Node) -> None:
        """A convolution, with its batch norm and activation if they alone read it."""
        conv = self._packed(node)
        if type(conv) not in CONVOLUTIONS or getattr(conv, "padding_mode", "zeros") != "zeros":
            return
        last, norm, activation = node, self._norm_after(node), None
        if norm is not None:
            last = norm
            activation = self._activation_inside(norm)
        if activation is None:
            last, activation = self._activation_after(last)
        operation = self._operation(node)
        assert operation is not None
        fused = FusedConv(operation, self._operation(norm), activation)
        self._replace(last, fused, (self.span, node.args[-1]))

    def _norm_after(self, node: fx.Node) -> fx.Node | None:
        """The batch norm that alone reads a convolution's output, if it only scales it."""
        reader = next(iter(node.users), None)
        if reader is None or len(node.users) > 1:
            return None
        norm = self._packed(reader)
        if type(norm) not in _NORMS or getattr(norm, "running_mean", None) is None:
            return None
        # timm's norm may drop blocks of its output, or have an activation nobody here knows.
        only_scales = type(norm) is not BatchNormAct2d
        return reader if only_scales or self._activation_inside(reader) is not None else None

    def _fuse_addition(self, node: fx.Node) -> None:
        """A sum, computed by the convolution that makes an operand or written over it."""
        operands = self._addition(node)
        overwritable = [operand for operand in operands if self._is_overwritable(operand)]
        if not overwritable or operands[0] is operands[1]:
            return
        # oneDNN's convolution adds while it writes, which saves a pass over memory.
        target = next(filter(self._ends_in_convolution, overwritable), overwritable[0])
        addend = operands[1] if target is operands[0] else operands[0]
        last, activation = self._activation_after(node)
        operation = self._operation(target)
        if isinstance(operation, FusedConv) and self._ends_in_convolution(target):
            fused = FusedConv(*operation.operations, activation)
            self._replace(last, fused, (self.span, target.args[1], addend))
        else:
            self._replace(last, AddInto(activation), (self.span, target, addend))

    def _ends_in_convolution(self, node: fx.Node) -> bool:
        # An activation would have to come before the sum; three inputs mean a sum is there already.
        operation = self._operation(node)
        plain = isinstance(operation, FusedConv) and operation.activation is None
        return plain and len(node.args) == 2

    def _fuse_activation(self, node: fx.Node) -> None:
        """An activation, written over a new tensor that it alone reads."""
        if self._is_overwritable(node):
            last, activation = self._activation_after(node)
            if activation is not None:
                self._replace(last, Overwrite(activation), (self.span, node))

    def _is_overwritable(self, node: fx.Node) -> bool:
        """Whether a value is a new tensor with a single reader."""
        operation = self._operation(node)
        if operation is None or len(node.users) != 1:
            return False
        if isinstance(operation, Direct | Broadcast):
            return operation.target in _ARITHMETIC
        fused = isinstance(operation, FusedConv | FusedLinear | AddInto)
        return fused or type(packed_module(operation)) in _FRESH

    def _addition(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a sum of two values; empty for anything else."""
        target, args = node.target, node.args
        operation = self._operation(node)
        if operation is not None:
            if not isinstance(operation, Direct):
                return []
            target, args = operation.target, args[1:]
        operands = [arg for arg in args if isinstance(arg, fx.Node)]
        is_sum = target in _ADDITIONS and len(operands) == len(args) == 2 and not node.kwargs
        return operands if is_sum else []

    def _activation_inside(self, node: fx.Node) -> Activation | None:
        """The activation inside a norm, if that is all it adds."""
        norm: Any = self._packed(node)
        if type(norm) is not BatchNormAct2d or type(norm.drop) is not nn.Identity:
            return None
        return _overwriting(norm.act)

    def _activation_after(self, node: fx.Node) -> tuple[fx.Node, Activation | None]:
        """The activation that alone reads a value, and its node; else the value's own node."""
        if len(node.users) != 1:
            return node, None
        reader = next(iter(node.users))
        operation = self._operation(reader)
        activation = None
        if reader.op == "call_function" and len(reader.args) == 1 and not reader.kwargs:
            activation = _FUNCTIONS.get(reader.target)
        elif isinstance(operation, Direct) and not isinstance(operation.target, nn.Module):
            if len(reader.args) == 2 and not reader.kwargs:
                activation = _FUNCTIONS.get(operation.target)
        elif (module := self._single(reader)) is not None:
            activation = _overwriting(module)
        return (node, None) if activation is None else (reader, activation)

    def _operation(self, node: fx.Node | None) -> nn.Module | None:
        """What a node calls, if that is a module."""
        if node is None or node.op != "call_module":
            return None
        return self.modules[str(node.target)]

    def _packed(self, node: fx.Node) -> nn.Module | None:
        """The ensemble's module that a node calls with a single tensor."""
        operation = self._operation(node)
        if operation is None or node.kwargs:
            return None
        has_one_argument = len(node.args) == (2 if isinstance(operation, Widened) else 1)
        return packed_module(operation) if has_one_argument else None

    def _single(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls with a single tensor, also as it stands or at random."""
        operation = self._operation(node)
        if isinstance(operation, Direct) and isinstance(operation.target, nn.Module):
            return operation.target if len(node.args) == 2 and not node.kwargs else None
        if isinstance(operation, PackedStochasticDepth):
            return operation.drop
        return self._packed(node)

    def _replace(self, last: fx.Node, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Let a module take the place of `last` and of what only `last` needed."""
        name = f"{last.name}_fused"
        self.modules[name] = module
        with self.graph.inserting_before(last):
            fused = self.graph.create_node("call_module", name, args, {}, name=name)
        last.replace_all_uses_with(fused)
        self._erase(last)

    def _erase(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        self.erased.add(node)
        if node.op == "call_module":
            del self.modules[str(node.target)]
        for source in inputs:
            # One that is erased already was an input of another, too.
            if source not in self.erased and not source.users and source.op != "placeholder":
                self._erase(source)


def _overwriting(module: nn.Module) -> Activation | None:
    """An activation that may overwrite its input; None where the module is no such activation."""
    kind = type(module)
    if kind is nn.Identity:
        return Activation(module, "none")
    if kind is nn.ReLU:
        return _RELU
    if kind is nn.ReLU6:
        return _RELU6
    if kind in (nn.GELU, timm_act.GELU):
        approximate = getattr(module, "approximate", "none")
        overwrite = partial(torch.ops.aten.gelu_, approximate=approximate)
        return Activation(overwrite, "gelu", [], approximate)
    if kind not in ACTIVATIONS or not hasattr(module, "inplace"):
        return None
    overwriting = copy.copy(module)
    overwriting.inplace = True  # type: ignore[assignment]
    return Activation(overwriting)
