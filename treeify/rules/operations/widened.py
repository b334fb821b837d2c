"""Modules that run packed as themselves, with more channels and groups: convolutions, norms, ..."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from treeify.engine.forms import read_once
from treeify.engine.packed_tensors import call_with, narrow
from treeify.rules.call import Call, Unpackable
from treeify.rules.operations import patches
from treeify.rules.table import rules_of
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span

# What users change on a module after it was made.
_LIVE = ("training", "eps", "momentum")


class Widened(nn.Module):
    """Runs a widened module, or the part of it that a span of branches needs.

    Args:
        module: the packed module in the ensemble, with all `branches` of its level.
        base: the base architecture's module.
        branches: how many branches `module` holds.
        of_channels: whether what it does depends on how many there are, even without tensors.
    """

    def __init__(
        self, module: nn.Module, base: nn.Module, branches: int, *, of_channels: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.base = base
        self.branches = branches
        self._resized: dict[int, nn.Module] = {}
        self.has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
        self.of_channels = of_channels
        if branches > 1 and (self.has_tensors or of_channels):
            self.resized(1)  # made here, so that compiling a looped level meets no copying

    def forward(self, span: Span, x: Tensor, *sizes: Any, **named: Any) -> Any:
        """`[N, G*C, ...]` -> what the module makes of it, for the branches of `span`."""
        if not self.has_tensors and self.of_channels:
            return self.resized(span.size)(x, *sizes, **named)
        if span.size == self.branches or not self.has_tensors:
            return self.module(x, *sizes, **named)
        return call_with(self.resized(span.size), self.tensors(span), (x, *sizes), named)

    def resized(self, count: int) -> nn.Module:
        """The base architecture's module, widened for `count` branches; its tensors go unused."""
        if count not in self._resized:
            made = copy.copy(self.base)
            made._modules = self.module._modules
            widen = rules_of(type(self.base)).widen
            assert widen is not None
            widen(made, count)
            self._resized[count] = made  # whole: another thread may be waiting for it
        part = self._resized[count]
        for name in _LIVE:
            if name in self.module.__dict__:
                part.__dict__[name] = self.module.__dict__[name]
        return part

    def tensors(self, span: Span) -> dict[str, Tensor]:
        """The packed tensors' parts for the branches of `span`; views."""
        packed: dict[str, Tensor | None] = {**self.module._parameters, **self.module._buffers}
        return {
            name: narrow(tensor, self.branches, span)
            for name, tensor in packed.items()
            if tensor is not None
        }


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
        conv: Any = base
        self.groups: int = conv.groups
        self.has_patches = patches.has_patches(base)
        self._readers: dict[tuple[int, int], nn.Module] = {}
        if ratio > 1:  # made here for all branches, so that compiling meets no copying
            reader = self._reading(branches, branches // ratio * self.groups)
            reader._parameters = module._parameters
            self._reading(1, self.groups)

    def forward(self, span: Span, x: Tensor) -> Any:
        """`[N, P*C, ...]` of the span's `P` parents -> `[N, G*O, ...]`."""
        parents = span.size
        if self.ratio > 1:
            parents, x = read_once(span, self.ratio, x, self.known)
        if self._is_product(span, x):
            weight, bias = (self.tensors(span).get(name) for name in ("weight", "bias"))
            assert weight is not None
            return patches.convolve(self.base, x, weight, bias, parents)
        return super().forward(span, x) if self.ratio == 1 else self._grouped(span, parents, x)

    def _is_product(self, span: Span, x: Tensor) -> bool:
        """Whether to multiply patches instead; hooks and parametrizations need the module."""
        module = self.module
        if not self.has_patches or type(module) is not nn.Conv2d:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        return patches.pays(self.base, span.size, x)

    def _reading(self, count: int, groups: int) -> nn.Module:
        """The convolution with `count` branches' output channels over `groups` input groups."""
        key = (count, groups)
        if key not in self._readers:
            reader: Any = copy.copy(self.resized(count))
            reader.groups = groups
            self._readers[key] = reader
        return self._readers[key]

    def _grouped(self, span: Span, parents: int, x: Tensor) -> Tensor:
        """One convolution with the parents' groups and all siblings' output channels."""
        groups: int = self.groups
        conv = self._reading(span.size, parents * groups)
        if groups == 1 and span.size == self.branches:
            result: Tensor = conv(x)
            return result
        tensors = self.tensors(span)
        if groups == 1:
            output: Tensor = call_with(conv, tensors, (x,))
            return output
        # Group j of a parent feeds group j of every sibling: channels leave the convolution as
        # (parent, group, sibling, o), and are packed as (parent, sibling, group, o).
        siblings = span.size // parents
        swapped = {
            name: swap(tensor, 0, parents, siblings, groups) for name, tensor in tensors.items()
        }
        return swap(call_with(conv, swapped, (x,)), 1, parents, groups, siblings)


def swap(tensor: Tensor, dim: int, parents: int, outer: int, inner: int) -> Tensor:
    """Exchange two of the axes that lie in `dim`: `(parents, outer, inner, rest)`."""
    rest = tensor.shape[dim] // (parents * outer * inner)
    axes = torch.unflatten(tensor, dim, (parents, outer, inner, rest))
    return axes.transpose(dim + 1, dim + 2).flatten(dim, dim + 3)


def widened(call: Call, *, of_channels: bool = False) -> Widened:
    """The packed operation of a module that has a widen rule.

    Args:
        call: of the module.
        of_channels: as `Widened` takes it.

    Raises:
        Unpackable: its input is not packable, or it reads another tensor too.
    """
    if len(call.tensor_arguments()) > 1:
        raise Unpackable("it reads more than one tensor")
    call.input_facts()
    return Widened(call.packed_module, call.module, call.branches, of_channels=of_channels)


def widened_conv(call: Call) -> WidenedConv:
    """The packed operation of a convolution, reading the input of a split once.

    Raises:
        Unpackable: its input is not a batch of images.
    """
    known = call.input_facts()
    conv: Any = call.module
    if len(known.shape) != len(conv.kernel_size) + 2:
        raise Unpackable("its input has no batch dim")
    return WidenedConv(call.packed_module, conv, call.branches, call.ratio, known)


class OfRows(nn.Module):
    """Runs a widened module on branches in the batch, where every image has several rows.

    Args:
        operation: what runs with branches in the channels.
    """

    def __init__(self, operation: Widened) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[G*R, C, ...] -> [G*R, O, ...]`."""
        rows = torch.unflatten(x, 0, (span.size, -1)).transpose(0, 1)
        result = self.operation(span, rows.flatten(1, 2))
        return torch.unflatten(result, 1, (span.size, -1)).transpose(0, 1).flatten(0, 1)


def of_rows(call: Call, *, of_channels: bool = False) -> OfRows:
    """The operation in the batch of a module that has a widen rule.

    Args:
        call: of the module.
        of_channels: as `Widened` takes it.

    Raises:
        Unpackable: its input does not begin with rows of images, or has one for each: then branches
            run in the channels.
    """
    known = call.batch_facts()
    if known.batch_dim != 0 or len(known.shape) < 2:
        raise Unpackable("its input does not begin with the batch")
    if known.branch_dim == 1:
        raise Unpackable("its input has one row for each image")
    return OfRows(Widened(call.packed_module, call.module, call.branches, of_channels=of_channels))
