"""Convolutions of all branches as grouped ones, with weights packed, read or mixed."""

import copy
from typing import Any

import torch
from timm.layers.cond_conv2d import CondConv2d
from torch import Tensor, nn

from treeify.engine.forms import read_once
from treeify.engine.packed_tensors import call_with
from treeify.rules.operations import patches
from treeify.rules.operations.direct import TargetOperation
from treeify.rules.operations.packed import PackedOperation
from treeify.rules.operations.widened import Widened
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


class WidenedConv(Widened):
    """A widened convolution that reads the input of a split once for all siblings.

    Siblings read the same activation, so it need not be replicated for them: a convolution with
    the parents' groups and all their children's output channels computes the same.

    Args:
        module: the packed convolution.
        base: the base architecture's convolution.
        branches: how many branches `module` holds.
        ratio: siblings per input branch; above 1 only right after a split.
        input_facts: of the input, to replicate it for a span that cuts through siblings.
    """

    def __init__(
        self,
        module: nn.Module,
        base: nn.Module,
        branches: int,
        ratio: int,
        input_facts: TensorFacts,
    ) -> None:
        """Make the convolutions that read for siblings where a split comes before."""
        super().__init__(module, base, branches)
        self.ratio = ratio
        self.input_facts = input_facts
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
            parents, x = read_once(span, self.ratio, x, self.input_facts)
        if self._is_product(span, x):
            part = self.tensors(span)
            return patches.convolve(self.base, x, part["weight"], part.get("bias"), parents)
        if self.ratio == 1:
            return super().forward(span, x)
        return self._grouped(span, parents, x)

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
    """Exchange two of the axes that lie in `dim`: `(parents, outer, inner, channels)`."""
    channels = tensor.shape[dim] // (parents * outer * inner)
    axes = torch.unflatten(tensor, dim, (parents, outer, inner, channels))
    return axes.transpose(dim + 1, dim + 2).flatten(dim, dim + 3)


class ConvFunction(TargetOperation):
    """A convolution with weights that the base model reads or computes itself."""

    def forward(
        self,
        span: Span,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """`[N, G*C, ...]`, `[G, O, I, ...]` and `[G, O]` -> `[N, G*O, ...]`."""
        bias = None if bias is None else bias.flatten(0, 1)
        groups *= span.size
        packed = weight.flatten(0, 1)
        result: Tensor = self.target(input, packed, bias, stride, padding, dilation, groups)
        return result


class PackedCondConv(PackedOperation):
    """timm's convolution whose weights every image mixes for itself from those of experts.

    It is a grouped convolution over the images already, so only the mixing has to know the branch.
    The packed `weight` is `[G*E, P]` of `E` experts, the `bias` `[G*E, O]` or None; options are the
    base architecture's.
    """

    def __init__(self, module: CondConv2d, packed_module: nn.Module, branches: int) -> None:
        super().__init__(packed_module, branches)
        self.module = module

    def forward(self, span: Span, x: Tensor, routing_weights: Tensor) -> Tensor:
        """`[G*N, C, H, W]` and weights of the experts `[G*N, E]` -> `[G*N, O, H, W]`."""
        experts = {
            name: torch.unflatten(part, 0, (span.size, -1))
            for name in ("weight", "bias")
            if (part := self.part(span, name)) is not None
        }
        routing = routing_weights.reshape(span.size, -1, routing_weights.shape[-1])
        mixed: Tensor = call_with(self.module, experts, (x, routing))
        return mixed
