"""Linear layers with the activation that follows them fused in."""

from typing import Any

import torch
from torch import Tensor, nn

from treeify.engine.packed_tensors import narrow
from treeify.fusion.overwrite import Activation, attributes
from treeify.fusion.prepared_weights import SMALL, Prepared, Weights, has_onednn, suits_onednn
from treeify.rules.operations.linear import PackedLinear
from treeify.tree import Span


class FusedLinear(Prepared):
    """A linear layer with the activation that follows it.

    A single branch runs by oneDNN, with weights reordered once and the activation in the same pass.
    Several branches stay one batched product, whose weights need no copy.

    Args:
        linear: the layer as the segment calls it: a `PackedLinear`, or at level 0 the ensemble's
            own module.
        activation: applied last; None for none.
    """

    def __init__(self, linear: nn.Module, activation: Activation | None) -> None:
        packed = linear if isinstance(linear, PackedLinear) else None
        module: Any = linear if packed is None else packed.packed_module
        super().__init__([(module, ("weight", "bias"))])
        # In tuples: looking up a registered submodule costs as much as a small operation.
        self.operations: tuple[Any] = (linear,)
        self._module: tuple[Any] = (module,)
        self.activation = activation
        self.branches = 1 if packed is None else packed.branches
        self.is_packed = packed is not None
        self.has_onednn = has_onednn()

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[G*N, ..., I] -> [G*N, ..., O]`."""
        if self.has_onednn and span.size == 1 and suits_onednn(x) and self.refresh():
            outputs = self._module[0].weight.shape[0] // self.branches
            if x.numel() * outputs >= SMALL:
                return self._onednn(span, x)
        linear, activation = self.operations[0], self.activation
        result: Tensor = linear(span, x) if self.is_packed else linear(x)
        return result if activation is None else activation.apply(result)

    def _onednn(self, span: Span, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        weight, bias = self.cached((span, rows), self._prepare)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        activation = self.activation
        result: Tensor = multiply(x, weight, bias, *attributes(activation))
        return result if activation is None or activation.name else activation.apply(result)

    def _prepare(self, weight: Tensor, bias: Tensor | None, span: Span, rows: int) -> Weights:
        """One branch's weight and bias, reordered for that many rows."""
        weight = narrow(weight, self.branches, span).contiguous()
        bias = None if bias is None else narrow(bias, self.branches, span)
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias

    def fold(self) -> Weights:
        """The layer's weight and bias, which have nothing folded into them."""
        linear = self._module[0]
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()

    def extra_repr(self) -> str:
        """What was fused, for printing a segment."""
        return type(self.operations[0]).__name__
