"""Batch norms over the images of all processes, however the ensemble runs them.

A packed norm is one batch norm over the channels of all branches, a looped one a call on a part of
its tensors. Every one of them ends in `torch.nn.functional.batch_norm`, so that is the one place
where statistics are shared.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode


class SyncedBatchNorms(TorchFunctionMode):
    """While entered, batch norms in training mode share their statistics between processes.

    A process whose images do not count still takes part: the others wait for it.
    """

    def __init__(self, *, counts: bool = True) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `F.batch_norm`; everything else runs as it is."""
        if func is F.batch_norm:
            return synced_batch_norm(*args, **(kwargs or {}), counts=self.counts)
        return func(*args, **(kwargs or {}))


def synced_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    counts: bool = True,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with the statistics of all processes' images.

    `x` has those of this process, `[N, C, ...]`: other processes may have another N, and with
    `counts=False` these are left out. Nothing is shared unless `training`.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # sums need the digits
    count = torch.full((1,), x.numel() // x.shape[1], dtype=values.dtype, device=x.device)
    # Sums and counts, not means: processes may have different numbers of images.
    total = _sum(torch.cat([values.sum(dims), count]) * counts)
    mean, count = total[:-1] / total[-1], total[-1].detach()
    centred = values - mean.view(shape)
    # About the mean and not from the mean square: that would cancel digits.
    var = _sum(centred.square().sum(dims) * counts) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            # PyTorch normalises with the biased variance, and keeps the unbiased one.
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    normed = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        normed = normed * weight.view(shape)
    if bias is not None:
        normed = normed + bias.view(shape)
    return normed.to(x.dtype)


def _sum(local: Tensor) -> Tensor:
    """Sum over all processes, gradients too: each one's loss depends on everybody's images."""
    total: Tensor = all_reduce(local)  # type: ignore[no-untyped-call]
    return total


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
