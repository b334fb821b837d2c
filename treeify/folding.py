"""Shortcuts of evaluation without gradients: batch norms folded, fresh values overwritten.

In evaluation mode a batch norm is a scale and a shift per channel, and so is part of the
convolution whose output it alone reads. The folded weights are computed when first used, and again
whenever a tensor they come from has changed. An activation or a sum that alone reads a new tensor
may overwrite it, since no gradient will ask for it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import timm.layers.activations as timm_act
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from treeify.packing import read_once
from treeify.program import Program, Segment
from treeify.rules.elementwise import ACTIVATIONS, Broadcast, Direct
from treeify.rules.linear import PackedLinear
from treeify.rules.norm import PackedLayerNorm
from treeify.rules.widened import Widened, WidenedConv, swap
from treeify.storage import narrow
from treeify.tree import Span

Activation = Callable[[Tensor], Tensor]

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    Conv2dSame: conv2d_same,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
_ADDITIONS = (operator.add, torch.add, "add")
_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), torch.relu_),
    F.relu6: partial(F.relu6, inplace=True),
    F.silu: partial(F.silu, inplace=True),
    F.hardswish: partial(F.hardswish, inplace=True),
    F.gelu: torch.ops.aten.gelu_,
}
# Operations whose result is a new tensor that nothing else looks into.
_FRESH = (nn.Linear, nn.LayerNorm, PackedLinear, PackedLayerNorm, *_CONVOLUTIONS, *_NORMS)
_ARITHMETIC = (*_ADDITIONS, operator.mul, torch.mul, "mul", operator.sub, torch.sub, "sub")


def fold(program: Program) -> Program:
    """The same program with every batch norm folded that only scales a convolution's output."""
    return replace(program, segments=tuple(_Folder(part).run() for part in program.segments))


class FoldedConv(nn.Module):
    """A convolution with its batch norm and activation.

    Args:
        conv: the convolution as the segment calls it: a `WidenedConv`, or at level 0 the
            ensemble's own module.
        norm: the batch norm, likewise.
        activation: overwrites its argument; None for none.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, activation: Activation | None) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation
        self.stored_conv: Any = _stored(conv)
        self.stored_norm: Any = _stored(norm)
        wide = conv if isinstance(conv, WidenedConv) else None
        self.branches = wide.branches if wide else 1
        self.ratio = wide.ratio if wide else 1
        self.groups: int = (wide.base if wide else conv).groups  # type: ignore[assignment]
        self.convolve = partial(
            _CONVOLUTIONS[type(self.stored_conv)],
            stride=self.stored_conv.stride,
            padding=self.stored_conv.padding,
            dilation=self.stored_conv.dilation,
        )
        self._sources: list[tuple[Tensor, int]] = []
        self._folded: tuple[Tensor, Tensor] | None = None
        self._parts: dict[tuple[Span, int], tuple[Tensor, Tensor]] = {}

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, P*C, ...]` of the span's `P` parents -> `[N, G*O, ...]`."""
        if self.stored_norm.training or self.stored_conv.weight.is_inference():
            return self._unfolded(span, x)
        parents = span.size
        if self.ratio > 1:
            parents, x = read_once(span, self.ratio, x, self.conv.known)  # type: ignore[arg-type]
        weight, bias = self._tensors(span, parents)
        result: Tensor = self.convolve(x, weight, bias, groups=parents * self.groups)
        if self._exchanges(span, parents):
            result = swap(result, 1, parents, self.groups, span.size // parents)
        return result if self.activation is None else self.activation(result)

    def _unfolded(self, span: Span, x: Tensor) -> Tensor:
        """For a norm in training mode, and where changes of the weights cannot be noticed."""
        for operation in (self.conv, self.norm):
            x = operation(span, x) if isinstance(operation, Widened) else operation(x)
        # The norm of a `BatchNormAct2d` has the activation in it already.
        own = type(self.stored_norm) is BatchNormAct2d
        return x if own or self.activation is None else self.activation(x)

    def _exchanges(self, span: Span, parents: int) -> bool:
        """Whether channels leave the convolution in another order, see `WidenedConv`."""
        return self.groups > 1 and parents != span.size

    def _tensors(self, span: Span, parents: int) -> tuple[Tensor, Tensor]:
        """The folded weight and bias of a span, for convolving over its parents."""
        self._refresh()
        key = (span, parents)
        if key not in self._parts:
            assert self._folded is not None
            parts = tuple(narrow(tensor, self.branches, span) for tensor in self._folded)
            if self._exchanges(span, parents):
                siblings = span.size // parents
                parts = tuple(swap(part, 0, parents, siblings, self.groups) for part in parts)
            self._parts[key] = parts  # type: ignore[assignment]
        return self._parts[key]

    @torch.no_grad()
    def _refresh(self) -> None:
        """Fold again if a tensor was replaced, moved or written to."""
        conv, norm = self.stored_conv, self.stored_norm
        found = [conv.weight, norm.running_mean, norm.running_var]
        found += [tensor for tensor in (conv.bias, norm.weight, norm.bias) if tensor is not None]
        if len(found) == len(self._sources) and all(
            tensor.data_ptr() == known.data_ptr() and tensor._version == version
            for tensor, (known, version) in zip(found, self._sources, strict=True)
        ):
            return
        weight, bias = fuse_conv_bn_weights(
            *(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps),
            *(norm.weight, norm.bias),
        )
        like = conv.weight
        memory_format = torch.contiguous_format
        if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
            memory_format = torch.channels_last
        self._folded = weight.detach().contiguous(memory_format=memory_format), bias.detach()
        self._parts.clear()
        # Holding on to the sources keeps their addresses from being given to others.
        self._sources = [(tensor.detach(), tensor._version) for tensor in found]

    def extra_repr(self) -> str:
        """What was folded, for printing a segment."""
        return f"{type(self.stored_conv).__name__} + {type(self.stored_norm).__name__}"


def _stored(operation: nn.Module) -> nn.Module:
    """The packed module in the ensemble."""
    return operation.module if isinstance(operation, Widened) else operation


class Overwrite(nn.Module):
    """An activation written over its input, which nothing else reads."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """The same shape."""
        return self.activation(x)


class AddInto(nn.Module):
    """A sum written over one of its operands, which nothing else reads."""

    def __init__(self, position: int, activation: Activation | None) -> None:
        super().__init__()
        self.position, self.activation = position, activation

    def forward(self, span: Span, *operands: Tensor) -> Tensor:
        """The sum of two tensors."""
        own, other = operands[self.position], operands[1 - self.position]
        same = own.shape == other.shape and own.dtype == other.dtype
        result = own.add_(other) if same else own + other
        return result if self.activation is None else self.activation(result)


class _Folder:
    """Folds one segment."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.modules: dict[str, nn.Module] = dict(segment.module._modules)  # type: ignore[arg-type]
        self.graph = copy.deepcopy(segment.module.graph)
        self.span = next(iter(self.graph.nodes))
        self.erased: set[fx.Node] = set()

    def run(self) -> Segment:
        for fold_at in (self._fold_norm, self._fold_addition, self._fold_activation):
            for node in reversed(list(self.graph.nodes)):
                if node not in self.erased:
                    fold_at(node)
        self.graph.lint()
        name = f"Level{self.segment.level}"
        return replace(self.segment, module=fx.GraphModule(self.modules, self.graph, name))

    def _fold_norm(self, node: fx.Node) -> None:
        norm = self._packed(node)
        if type(norm) not in _NORMS or getattr(norm, "running_mean", None) is None:
            return
        source = node.args[-1]
        if not isinstance(source, fx.Node) or len(source.users) > 1:
            return
        conv = self._packed(source)
        if type(conv) not in _CONVOLUTIONS or getattr(conv, "padding_mode", "zeros") != "zeros":
            return
        last, activation = node, self._own_activation(norm)
        if activation is None:
            if type(norm) is BatchNormAct2d:
                return
            last, activation = self._following_activation(node)
        called = [self.modules[str(part.target)] for part in (source, node)]
        folded = FoldedConv(called[0], called[1], activation)
        self._replace(last, folded, (self.span, source.args[-1]))

    def _fold_addition(self, node: fx.Node) -> None:
        operands = self._addition(node)
        for position, operand in enumerate(operands):
            if self._is_spare(operand) and operands[0] is not operands[1]:
                last, activation = self._following_activation(node)
                self._replace(last, AddInto(position, activation), (self.span, *operands))
                return

    def _fold_activation(self, node: fx.Node) -> None:
        if self._is_spare(node):
            last, activation = self._following_activation(node)
            if activation is not None:
                self._replace(last, Overwrite(activation), (self.span, node))

    def _is_spare(self, node: fx.Node) -> bool:
        """Whether a value is a new tensor with a single reader."""
        if len(node.users) != 1 or node.op != "call_module":
            return False
        operation = self.modules[str(node.target)]
        if isinstance(operation, Direct | Broadcast):
            return operation.target in _ARITHMETIC
        return isinstance(operation, FoldedConv | AddInto) or type(_stored(operation)) in _FRESH

    def _addition(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a sum of two tensors; empty for anything else."""
        target, args = node.target, node.args
        if node.op == "call_module":
            direct = self.modules[str(node.target)]
            if not isinstance(direct, Direct):
                return []
            target, args = direct.target, args[1:]
        operands = [arg for arg in args if isinstance(arg, fx.Node)]
        is_sum = target in _ADDITIONS and len(operands) == len(args) == 2 and not node.kwargs
        return operands if is_sum else []

    def _replace(self, last: fx.Node, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Let a module take the place of `last` and of what it alone needed."""
        name = f"{last.name}_folded"
        self.modules[name] = module
        with self.graph.inserting_before(last):
            made = self.graph.create_node("call_module", name, args, {}, name=name)
        last.replace_all_uses_with(made)
        self._erase(last)

    def _erase(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        self.erased.add(node)
        if node.op == "call_module":
            self.modules.pop(str(node.target), None)
        for source in inputs:
            if not source.users and source.op != "placeholder":
                self._erase(source)

    def _packed(self, node: fx.Node) -> nn.Module | None:
        """The packed module that a node calls with a single tensor."""
        if node.op != "call_module" or node.kwargs:
            return None
        module = self.modules[str(node.target)]
        alone = len(node.args) == (2 if isinstance(module, Widened) else 1)
        return _stored(module) if alone else None

    def _own_activation(self, norm: nn.Module | None) -> Activation | None:
        """The activation inside a norm."""
        if type(norm) is not BatchNormAct2d or type(norm.drop) is not nn.Identity:
            return None
        return _overwriting(norm.act)

    def _following_activation(self, node: fx.Node) -> tuple[fx.Node, Activation | None]:
        """The activation that alone reads a value, and its node; else the value's own node."""
        if len(node.users) != 1:
            return node, None
        reader = next(iter(node.users))
        if reader.op == "call_function":
            alone = len(reader.args) == 1 and not reader.kwargs
            found = _FUNCTIONS.get(reader.target) if alone else None
        elif reader.op == "call_module" and isinstance(
            direct := self.modules[str(reader.target)], Direct
        ):
            alone = len(reader.args) == 2 and not reader.kwargs
            found = _FUNCTIONS.get(direct.target) if alone else None
        else:
            module = self._packed(reader)
            found = None if module is None else _overwriting(module)
        return (node, None) if found is None else (reader, found)


def _overwriting(module: nn.Module) -> Activation | None:
    """An activation that may overwrite its input; None where the module is no such activation."""
    if type(module) is nn.Identity:
        return module
    if type(module) is nn.GELU:
        return partial(torch.ops.aten.gelu_, approximate=module.approximate)
    if type(module) is timm_act.GELU:
        return torch.ops.aten.gelu_
    if type(module) not in ACTIVATIONS or not hasattr(module, "inplace"):
        return None
    again = copy.copy(module)
    again.inplace = True  # type: ignore[assignment]
    return again
