"""Modules that run packed as themselves, with more channels and groups: convolutions, norms, ..."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from treeify.packing import read_once
from treeify.rules.registry import WIDEN, Call, Unpackable
from treeify.storage import narrow
from treeify.trace import TensorFacts
from treeify.tree import Span


class Widened(nn.Module):
    """Runs a widened module, or the part of it that a span of branches needs.

    Args:
        module: the packed module in the ensemble, with all `branches` of its level.
        base: the base architecture's module.
        branches: how many branches `module` holds.
    """

    def __init__(self, module: nn.Module, base: nn.Module, branches: int) -> None:
        super().__init__()
        self.module = module
        self.base = base
        self.branches = branches
        self.has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))

    def forward(self, span: Span, x: Tensor) -> Any:
        """`[N, G*C, ...]` -> what the module makes of it, for the branches of `span`."""
        if span.size == self.branches or not self.has_tensors:
            return self.module(x)
        return self.narrowed(span)(x)

    def narrowed(self, span: Span) -> nn.Module:
        """The module for the branches of `span` only; its tensors are views."""
        part = with_tensors(
            self.base,
            {name: self.narrow(tensor, span) for name, tensor in self.module._parameters.items()},
            {name: self.narrow(tensor, span) for name, tensor in self.module._buffers.items()},
        )
        part.training = self.module.training
        part._modules = self.module._modules
        WIDEN[type(self.base)](part, span.size)
        return part

    def narrow(self, tensor: Tensor | None, span: Span) -> Tensor | None:
        """The part of a packed tensor for the branches of `span`."""
        return None if tensor is None else narrow(tensor, self.branches, span)


def with_tensors(
    module: nn.Module,
    parameters: dict[str, Tensor | None],
    buffers: dict[str, Tensor | None],
) -> nn.Module:
    """A shallow copy of a module that computes with other tensors."""
    part = copy.copy(module)
    part._parameters = parameters  # type: ignore[assignment]
    part._buffers = buffers
    return part


class WidenedConv(Widened):
    """A widened convolution that reads the input of a split once for all siblings.

    Args:
        module: the packed convolution.
        base: the base architecture's convolution.
        branches: how many branches `module` holds.
        ratio: siblings per input branch; above 1 only right after a split.
        known: facts of the input, to replicate it for a span that cuts through siblings.
    """

    def __init__(
        self, module: nn.Module, base: nn.Module, branches: int, ratio: int, known: TensorFacts
    ) -> None:
        super().__init__(module, base, branches)
        self.ratio = ratio
        self.known = known

    def forward(self, span: Span, x: Tensor) -> Any:
        """`[N, P*C, ...]` of the span's `P` parents -> `[N, G*O, ...]`."""
        if self.ratio == 1:
            return super().forward(span, x)
        parents, x = read_once(span, self.ratio, x, self.known)
        return self._grouped(span, parents, x)

    def _grouped(self, span: Span, parents: int, x: Tensor) -> Tensor:
        """One convolution with the parents' groups and all siblings' output channels."""
        conv: Any = self.narrowed(span)
        groups: int = conv.groups // span.size
        conv.groups = parents * groups
        if groups == 1:
            result: Tensor = conv(x)
            return result
        # Group j of a parent feeds group j of every sibling: channels leave the convolution as
        # (parent, group, sibling, o), and are packed as (parent, sibling, group, o).
        siblings = span.size // parents
        conv._parameters = {
            name: tensor if tensor is None else _swap(tensor, 0, parents, siblings, groups)
            for name, tensor in conv._parameters.items()
        }
        return _swap(conv(x), 1, parents, groups, siblings)


def _swap(tensor: Tensor, dim: int, parents: int, outer: int, inner: int) -> Tensor:
    """Exchange two of the axes folded into `dim`: `(parents, outer, inner, rest)`."""
    axes = torch.unflatten(tensor, dim, (parents, outer, inner, -1))
    return axes.transpose(dim + 1, dim + 2).flatten(dim, dim + 3)


def widened(call: Call) -> Widened:
    """The packed operation of a module that has a widen rule.

    Raises:
        Unpackable: its input is not packable.
    """
    call.input_facts()
    assert call.module is not None and call.storage is not None
    return Widened(call.storage, call.module, call.branches)


def widened_conv(call: Call) -> WidenedConv:
    """The packed operation of a convolution, reading the input of a split once.

    Raises:
        Unpackable: its input is not a batch of images.
    """
    known = call.input_facts()
    conv: Any = call.module
    if len(known.shape) != len(conv.kernel_size) + 2:
        raise Unpackable("its input has no batch dim")
    assert call.storage is not None
    return WidenedConv(call.storage, conv, call.branches, call.ratio, known)
