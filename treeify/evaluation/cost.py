"""What each nested sub-ensemble costs: MACs as fvcore counts what really runs, and parameters."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treeify.conversion.ensemble import HierarchicalEnsemble

with warnings.catch_warnings():  # fvcore uses torch.jit.script, which torch 2.14 deprecates
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import batchnorm_flop_jit, bmm_flop_jit, get_shape

# fvcore counts other normalisation and pooling too, by element. It would count the scale of a
# packed layer norm differently from the base model's, so these are left out.
_NOT_COUNTED = (
    "aten::layer_norm",
    "aten::group_norm",
    "aten::instance_norm",
    "aten::adaptive_avg_pool2d",
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
    "aten::grid_sampler",
)


@dataclass(frozen=True)
class Cost:
    """What a sub-ensemble costs.

    Args:
        leaves: its size.
        macs: multiply-accumulates per image.
        parameters: parameters its branches hold.
    """

    leaves: int
    macs: int
    parameters: int


class _Prefix(nn.Module):
    def __init__(self, hne: HierarchicalEnsemble, leaves: int) -> None:
        super().__init__()
        self.hne, self.leaves = hne, leaves

    def forward(self, x: Tensor) -> Any:
        return self.hne(x, leaves=self.leaves)


def costs(hne: HierarchicalEnsemble, x: Tensor | None = None) -> tuple[Cost, ...]:
    """Cost of every nested size.

    Args:
        hne: the ensemble; its mode is put back afterwards.
        x: one image `[1, C, H, W]` of the size to count for; by default the conversion's size.
    """
    x = hne.example_images(1) if x is None else x
    return tuple(
        Cost(size, macs(_Prefix(hne, size), x), hne.count_parameters(size))
        for size in hne.tree.nested_sizes
    )


def base_cost(hne: HierarchicalEnsemble, x: Tensor | None = None) -> Cost:
    """Cost of the base model; `n` independent networks cost `n` times as much."""
    base = hne.leaf(0)
    x = hne.example_images(1) if x is None else x
    return Cost(1, macs(base, x), sum(parameter.numel() for parameter in base.parameters()))


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one evaluation pass, counted by fvcore on the executed graph.

    Convolutions, matrix products and attention count each product; batch norms 2 per element,
    fvcore's convention, which the figures in the paper follow.

    Args:
        model: any module; its mode is put back afterwards.
        x: its input.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    analysis = FlopCountAnalysis(model, x)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle(**dict.fromkeys(_NOT_COUNTED, _nothing))
    analysis.set_op_handle(
        **{
            "aten::scaled_dot_product_attention": _attention,
            "aten::baddbmm": _baddbmm,
            "aten::batch_norm": _batch_norm,
        }
    )
    try:
        # With gradients on, attention layers keep to operations that can be counted.
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            total: float = analysis.total()
            return round(total)
    finally:
        for module, training in was_training.items():
            module.training = training


_Handle = Callable[[list[Any], list[Any]], Any]


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter()


def _batch_norm(inputs: list[Any], outputs: list[Any]) -> Any:
    """2 per element, fvcore's own count in evaluation mode; none for weight standardisation."""
    standardises_weights = inputs[5].toIValue()
    return Counter() if standardises_weights else batchnorm_flop_jit(inputs, outputs)


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """`q k^T` and the product with `v`: `[..., T, D], [..., S, D], [..., S, V]`."""
    query, key, value = (get_shape(inputs[index]) for index in range(3))
    rows = 1
    for size in query[:-1]:
        rows *= size
    return Counter({"attention": rows * key[-2] * (query[-1] + value[-1])})


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> Any:
    return bmm_flop_jit(inputs[1:3], outputs)
