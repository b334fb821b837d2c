"""Counts multiply-accumulates while a model runs; `evaluation.cost` says what counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from treeify.tracing.meta_kernels import MetaKernels

# The parameters of both functions that run batch norms, in order.
_BATCH_NORM = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
}


def _vector_flops(matrix: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * matrix.numel()


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Products that `FlopCounterMode` does not know.
_PRODUCTS = {
    torch.ops.aten.mv: _vector_flops,
    torch.ops.aten.dot: _vector_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


class MacCounter(MetaKernels):
    """Counts the multiply-accumulates of what runs within, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self._products = FlopCounterMode(display=False, custom_mapping=_PRODUCTS)
        self._norms = 0

    def __enter__(self) -> MacCounter:
        # As the one operation of the fast path, attention would not be counted.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._products.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._products.__exit__(*error)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fast_path)

    @property
    def macs(self) -> int:
        """Of everything so far."""
        return self._products.get_total_flops() // 2 + self._norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # By the function and not by what it dispatches to, which instance norms do as well.
        if func in _BATCH_NORM:
            arguments = dict(zip(_BATCH_NORM[func], args, strict=False)) | (kwargs or {})
            if not arguments.get("training", False):
                factor = 1 if arguments.get("weight") is None else 2
                self._norms += factor * arguments["input"].numel()
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients: counting FLOPs fails on some views of those that do."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
