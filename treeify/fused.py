"""Operations for evaluation without gradients: convolutions with what follows them fused in.

In evaluation mode a batch norm is a scale and a shift per channel, and so is part of the
convolution whose output it alone reads. Weights are folded and laid out for the processor when
first used, and again whenever a tensor they come from has changed. A sum or an activation that
alone reads a new tensor may overwrite it, since no gradient will ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from treeify.packing import read_once
from treeify.rules.widened import Widened, WidenedConv, swap
from treeify.storage import narrow
from treeify.tree import Span

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    Conv2dSame: conv2d_same,
}
# Prepared weights kept per convolution, as a multiple of the weights themselves: one set for full
# calls, the others for single branches and parts. Beyond it the oldest are dropped.
_KEPT = 4


@dataclass(frozen=True)
class Activation:
    """An activation that may overwrite its input.

    Args:
        apply: overwrites its argument and returns it.
        name: what oneDNN calls it; empty where it is done afterwards.
        scalars: oneDNN's parameters of it.
    """

    apply: Callable[[Tensor], Tensor]
    name: str = ""
    scalars: list[float] = field(default_factory=list)


def stored(operation: nn.Module) -> nn.Module:
    """The packed module in the ensemble that an operation of a segment runs."""
    return operation.module if isinstance(operation, Widened) else operation


class FusedConv(nn.Module):
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
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation
        self.stored_conv: Any = stored(conv)
        self.stored_norm: Any = None if norm is None else stored(norm)
        wide = conv if isinstance(conv, WidenedConv) else None
        self.branches = wide.branches if wide else 1
        self.ratio = wide.ratio if wide else 1
        self.groups: int = (wide.base if wide else conv).groups  # type: ignore[assignment]
        self._forget()

    def _forget(self) -> None:
        self._sources: list[tuple[Tensor, int]] = []
        self._folded: tuple[Tensor, Tensor | None] | None = None
        self._parts: dict[Any, tuple[Tensor, Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare their own weights."""
        nothing: dict[str, Any] = {"_sources": [], "_folded": None, "_parts": {}}
        return {**self.__dict__, **nothing}

    def forward(self, span: Span, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """`[N, P*C, ...]` of the span's `P` parents -> `[N, G*O, ...]`.

        Args:
            span: the branches to compute.
            x: the input.
            addend: added to the result before the activation, `[N, G*O, ...]`.
        """
        if self._must_not_fold():
            return self._unfused(span, x, addend)
        parents = span.size
        if self.ratio > 1:
            parents, x = read_once(span, self.ratio, x, self.conv.known)  # type: ignore[arg-type]
        if self._exchanges(span, parents):
            return self._exchanged(span, parents, x, addend)
        if _has_onednn(x, self.stored_conv):
            return self._onednn(span, parents, x, addend)
        weight, bias = self._tensors(span, parents)
        return self._finish(self._convolve(x, weight, bias, parents), addend)

    def _must_not_fold(self) -> bool:
        """For a norm in training mode, and where changes of the weights cannot be noticed."""
        training = self.stored_norm is not None and self.stored_norm.training
        return training or bool(self.stored_conv.weight.is_inference())

    def _unfused(self, span: Span, x: Tensor, addend: Tensor | None) -> Tensor:
        for operation in (self.conv, self.norm):
            if operation is not None:
                x = operation(span, x) if isinstance(operation, Widened) else operation(x)
        if type(self.stored_norm) is BatchNormAct2d:
            return x  # it has the activation in it already
        return self._finish(x, addend)

    def _finish(self, result: Tensor, addend: Tensor | None) -> Tensor:
        if addend is not None:
            result = add_into(result, addend)
        return result if self.activation is None else self.activation.apply(result)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, parents: int) -> Tensor:
        conv = self.stored_conv
        function = CONVOLUTIONS[type(conv)]
        groups = parents * self.groups
        return function(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)

    def _exchanges(self, span: Span, parents: int) -> bool:
        """Whether channels leave the convolution in another order, see `WidenedConv`."""
        return self.groups > 1 and parents != span.size

    def _exchanged(self, span: Span, parents: int, x: Tensor, addend: Tensor | None) -> Tensor:
        siblings = span.size // parents
        weight, bias = self._tensors(span, parents)
        result = self._convolve(x, weight, bias, parents)
        return self._finish(swap(result, 1, parents, self.groups, siblings), addend)

    def _onednn(self, span: Span, parents: int, x: Tensor, addend: Tensor | None) -> Tensor:
        """OneDNN's own call: weights laid out once, the sum and the activation in the same pass."""
        conv = self.stored_conv
        weight, bias = self._tensors(span, parents, x.shape)
        where = (conv.padding, conv.stride, conv.dilation, parents * self.groups)
        activation = self.activation
        convolve = torch.ops.mkldnn._convolution_pointwise
        if addend is None and activation is not None and activation.name:
            name, scalars = activation.name, activation.scalars
            result: Tensor = convolve(x, weight, bias, *where, name, scalars, "")
            return result
        return self._finish(convolve(x, weight, bias, *where, "none", [], ""), addend)

    def _tensors(
        self, span: Span, parents: int, shape: torch.Size | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a span, for convolving over its parents.

        Args:
            span: the branches.
            parents: how many branches the input holds.
            shape: of the input that oneDNN lays the weight out for; None leaves it as it is.
        """
        self._refresh()
        key = (span, parents, shape)
        if key not in self._parts:
            assert self._folded is not None
            weight, bias = (
                None if tensor is None else narrow(tensor, self.branches, span)
                for tensor in self._folded
            )
            assert weight is not None
            if self._exchanges(span, parents):
                siblings = span.size // parents
                weight = swap(weight, 0, parents, siblings, self.groups)
                bias = None if bias is None else swap(bias, 0, parents, siblings, self.groups)
            if shape is not None:
                weight = self._laid_out(weight, parents, shape)
            self._parts[key] = weight, bias
            self._drop_oldest()
        return self._parts[key]

    def _laid_out(self, weight: Tensor, parents: int, shape: torch.Size) -> Tensor:
        conv = self.stored_conv
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        prepared: Tensor = reorder(
            weight.contiguous().to_mkldnn(),
            *(conv.padding, conv.stride, conv.dilation, parents * self.groups, list(shape)),
        )
        return prepared

    def _drop_oldest(self) -> None:
        limit = _KEPT * self.stored_conv.weight.numel()
        held = sum(weight.numel() for weight, _ in self._parts.values())
        while held > limit:
            weight, _ = self._parts.pop(next(iter(self._parts)))
            held -= weight.numel()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Fold again if a tensor was replaced, moved or written to."""
        conv, norm = self.stored_conv, self.stored_norm
        found = [conv.weight, conv.bias]
        if norm is not None:
            found += [norm.running_mean, norm.running_var, norm.weight, norm.bias]
        found = [tensor for tensor in found if tensor is not None]
        if len(found) == len(self._sources) and all(
            tensor.data_ptr() == known.data_ptr() and tensor._version == version
            for tensor, (known, version) in zip(found, self._sources, strict=True)
        ):
            return
        self._forget()
        self._folded = self._fold()
        # Holding on to the sources keeps their addresses from being given to others.
        self._sources = [(tensor.detach(), tensor._version) for tensor in found]

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        conv, norm = self.stored_conv, self.stored_norm
        if norm is None:
            return conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        weight, bias = fuse_conv_bn_weights(
            *(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps),
            *(norm.weight, norm.bias),
        )
        like = conv.weight
        if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)  # type: ignore[assignment]
        return weight.detach(), bias.detach()

    def extra_repr(self) -> str:
        """What was fused, for printing a segment."""
        parts = [part for part in (self.stored_conv, self.stored_norm) if part is not None]
        return " + ".join(type(part).__name__ for part in parts)


def _has_onednn(x: Tensor, conv: nn.Module) -> bool:
    """Whether oneDNN's fused convolution takes this call."""
    library: Any = torch.backends.mkldnn
    return (
        type(conv) is nn.Conv2d
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.numel() > 0
        and isinstance(conv.padding, tuple)
        and bool(library.is_available() and library.enabled)
    )


def add_into(own: Tensor, other: Tensor) -> Tensor:
    """The sum, written over `own` where shapes and types allow."""
    same = own.shape == other.shape and own.dtype == other.dtype
    return own.add_(other) if same else own + other


class Overwrite(nn.Module):
    """An activation written over its input, which nothing else reads."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """The same shape."""
        return self.activation.apply(x)


class AddInto(nn.Module):
    """A sum written over its first operand, which nothing else reads."""

    def __init__(self, activation: Activation | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, span: Span, own: Tensor, other: Tensor) -> Tensor:
        """The sum of two tensors."""
        result = add_into(own, other)
        return result if self.activation is None else self.activation.apply(result)
