"""Convolutions with what follows them fused in.

In evaluation mode a batch norm is a scale and a shift per channel, and so is part of the
convolution whose output it alone reads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from treeify.engine.forms import read_once
from treeify.engine.packed_tensors import narrow
from treeify.fusion.overwrite import Activation, attributes, finish
from treeify.fusion.prepared_weights import SMALL, Prepared, Weights, has_onednn, suits_onednn
from treeify.rules.operations.conv import WidenedConv, swap
from treeify.rules.operations.widened import Widened
from treeify.tree import Span

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    Conv2dSame: conv2d_same,
}
_WEIGHTS = ("weight", "bias")
# Batch norm writes its statistics without leaving a trace; it counts its batches with one.
_STATISTICS = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")


def packed_module(operation: nn.Module) -> nn.Module:
    """The packed module in the ensemble that an operation of a segment runs."""
    return operation.module if isinstance(operation, Widened) else operation


class FusedConv(Prepared):
    """A convolution with the batch norm, the sum and the activation that follow it.

    Args:
        conv: the convolution as the segment calls it: a `WidenedConv`, or at level 0 the
            ensemble's own module.
        norm: the batch norm, likewise; None for none.
        activation: applied last; None for none.
    """

    def __init__(
        self, conv: nn.Module, norm: nn.Module | None, activation: Activation | None
    ) -> None:
        """Read everything that does not change between calls from the modules, once."""
        packed: Any = packed_module(conv)
        packed_norm = None if norm is None else packed_module(norm)
        sources: list[tuple[Any, tuple[str, ...]]] = [(packed, _WEIGHTS)]
        if packed_norm is not None:
            sources.append((packed_norm, _STATISTICS))
        super().__init__(sources)
        # In a tuple: looking up a registered submodule costs as much as a small operation.
        self.operations: tuple[Any, Any] = (conv, norm)
        self.activation = activation
        self._conv: tuple[Any] = (packed,)
        self._norm: tuple[Any] = (packed_norm,)
        wide = conv if isinstance(conv, WidenedConv) else None
        self.branches = wide.branches if wide else 1
        self.ratio = wide.ratio if wide else 1
        self.input_facts = wide.input_facts if wide else None
        self.groups: int = wide.groups if wide else packed.groups
        self.geometry = (packed.padding, packed.stride, packed.dilation)
        plain = type(packed) is nn.Conv2d and isinstance(packed.padding, tuple)
        self.has_onednn = plain and has_onednn()
        self.is_pointwise = self.groups == 1 and (
            plain and self.geometry == ((0, 0), (1, 1), (1, 1)) and packed.kernel_size == (1, 1)
        )

    def forward(self, span: Span, x: Tensor, addend: Tensor | float | None = None) -> Tensor:
        """`[N, P*C, ...]` of the span's `P` parents -> `[N, G*O, ...]`.

        Args:
            span: the branches to compute.
            x: the input.
            addend: added to the result before the activation, `[N, G*O, ...]`.
        """
        if not self._refresh():
            return self._unfused(span, x, addend)
        parents = span.size
        if self.ratio > 1:
            assert self.input_facts is not None
            parents, x = read_once(span, self.ratio, x, self.input_facts)
        if self.is_pointwise and span.size == 1 and self._is_small(x):
            return self._product(span, x, addend)
        swaps = self._swaps(span, parents)
        if self.has_onednn and not swaps and x.ndim == 4 and suits_onednn(x):
            return self._onednn(span, parents, x, addend)
        weight, bias = self._tensors(span, parents)
        padding, stride, dilation = self.geometry
        convolve = CONVOLUTIONS[type(self._conv[0])]
        result = convolve(x, weight, bias, stride, padding, dilation, parents * self.groups)
        if swaps:
            result = swap(result, 1, parents, self.groups, span.size // parents)
        return finish(result, addend, self.activation)

    def _unfused(self, span: Span, x: Tensor, addend: Tensor | float | None) -> Tensor:
        for operation in self.operations:
            if operation is not None:
                x = operation(span, x) if isinstance(operation, Widened) else operation(x)
        if type(self._norm[0]) is BatchNormAct2d:
            return x  # it has the activation in it already
        return finish(x, addend, self.activation)

    def _swaps(self, span: Span, parents: int) -> bool:
        """Whether channels leave the convolution in another order, see `WidenedConv`."""
        return self.groups > 1 and parents != span.size

    def _is_small(self, x: Tensor) -> bool:
        """Whether a product of one branch costs less than oneDNN's way to begin."""
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        return bool(x.numel() * self._conv[0].weight.shape[0] < SMALL * self.branches)

    def _product(self, span: Span, x: Tensor, addend: Tensor | float | None) -> Tensor:
        """A 1x1 convolution of one branch, `[N*H*W, C] @ [C, O]`."""
        weight, bias = self._tensors(span, 1)
        images, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        result = F.linear(rows, weight.view(-1, channels), bias)
        result = result.view(images, height, width, result.shape[1]).permute(0, 3, 1, 2)
        return finish(result, addend, self.activation)

    def _onednn(self, span: Span, parents: int, x: Tensor, addend: Tensor | float | None) -> Tensor:
        """OneDNN's own call: weights reordered once, the activation in the same pass."""
        weight, bias = self._tensors(span, parents, x.shape)
        convolve = torch.ops.mkldnn._convolution_pointwise.default
        groups = parents * self.groups
        # With an addend, the activation has to wait for the sum.
        activation = self.activation if addend is None else None
        result: Tensor = convolve(x, weight, bias, *self.geometry, groups, *attributes(activation))
        fused = activation is not None and activation.name
        return result if fused else finish(result, addend, self.activation)

    def _tensors(self, span: Span, parents: int, shape: torch.Size | None = None) -> Weights:
        """The weight and bias of a span, for convolving an input that holds its parents.

        With the input's shape, the weight is reordered for oneDNN.
        """
        return self.cached((span, parents, shape), self._prepare)

    def _prepare(
        self,
        weight: Tensor,
        bias: Tensor | None,
        span: Span,
        parents: int,
        shape: torch.Size | None,
    ) -> Weights:
        """Cut a span's part out of the folded weights, in the order `_tensors` needs."""
        weight = narrow(weight, self.branches, span)
        bias = None if bias is None else narrow(bias, self.branches, span)
        if self._swaps(span, parents):
            siblings = span.size // parents
            weight = swap(weight, 0, parents, siblings, self.groups)
            bias = None if bias is None else swap(bias, 0, parents, siblings, self.groups)
        if shape is not None:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            groups = parents * self.groups
            weight = reorder(weight.contiguous().to_mkldnn(), *self.geometry, groups, list(shape))
        return weight, bias

    def _refresh(self) -> bool:
        """Fold again if need be; False for a norm in training mode, which uses the batch."""
        norm = self._norm[0]
        if norm is not None and norm.training:
            self.forget()
            return False
        return self.refresh(None if norm is None else norm.eps)

    def fold(self) -> Weights:
        """The convolution's, with the norm's scale and shift in them."""
        conv, norm = self._conv[0], self._norm[0]
        if norm is None:
            return conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        weight, bias = fuse_conv_bn_weights(
            *(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps),
            *(norm.weight, norm.bias),
        )
        folded = weight.detach()
        # The product with the scale need not have the memory format of the weight.
        if conv.weight.ndim == 4 and conv.weight.is_contiguous(memory_format=torch.channels_last):
            folded = folded.contiguous(memory_format=torch.channels_last)
        return folded, bias.detach()

    def extra_repr(self) -> str:
        """What was fused, for printing a segment."""
        parts = [packed_module(part) for part in self.operations if part is not None]
        return " + ".join(type(part).__name__ for part in parts)
