"""Operations on packed tensors that have to tell the branches apart."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeify.engine.packed_tensors import narrow
from treeify.tree import Span


class PackedOperation(nn.Module):
    """An operation on the tensors of a packed module.

    Args:
        packed_module: holds tensors of all branches, `[G*C, ...]`, or None.
        branches: how many branches it holds.
    """

    def __init__(self, packed_module: nn.Module, branches: int) -> None:
        super().__init__()
        self.packed_module, self.branches = packed_module, branches

    def part(self, span: Span, name: str) -> Tensor | None:
        """A span's part of a tensor, a view; None for no tensor. A submodule's name is dotted."""
        path, _, attribute = name.rpartition(".")
        tensor = getattr(self.packed_module.get_submodule(path), attribute, None)
        return None if tensor is None else narrow(tensor, self.branches, span)

    def weight_and_bias(self, span: Span) -> tuple[Tensor | None, Tensor | None]:
        """The parts of the weight and the bias that belong to a span of branches."""
        return self.part(span, "weight"), self.part(span, "bias")


class PackedPReLU(PackedOperation):
    """PReLU with each branch's own slope, one for all channels or one per channel."""

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, ...] -> [N, G*C, ...]`."""
        slopes = self.part(span, "weight")
        assert slopes is not None
        return F.prelu(x, slopes.repeat_interleave(x.shape[1] // slopes.shape[0]))


class PackedStochasticDepth(nn.Module):
    """Drops whole residual branches per image and tree branch."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, ...] -> [N, G*C, ...]`."""
        if not self.drop.training:
            return x
        return torch.cat([self.drop(piece) for piece in x.chunk(span.size, dim=1)], dim=1)


class ConcatenateChannels(nn.Module):
    """Concatenation along dim 1 within every branch, in one copy."""

    def forward(self, span: Span, tensors: Any, *_: Any, **__: Any) -> Tensor:
        """`[N, G*C1, ...], [N, G*C2, ...] -> [N, G*(C1 + C2), ...]`."""
        pieces = [tensor.chunk(span.size, dim=1) for tensor in tensors]
        return torch.cat([piece for branch in zip(*pieces, strict=True) for piece in branch], dim=1)
