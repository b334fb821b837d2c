"""Weights prepared once for the processor, that follow the tensors they come from."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Weights = tuple[Tensor, Tensor | None]
# Prepared weights cached per layer, as a multiple of the weights themselves: one set for full
# calls, the others for single branches and parts. Beyond it the oldest are dropped.
_CACHE_SIZE = 4
# Multiply-accumulates of one branch's product below which plain PyTorch is faster than oneDNN: what
# a call of oneDNN costs before it computes anything is then more than what its layout saves.
SMALL = 16e6


class _FusedOptimizers:
    """Optimizers with `fused=True`, whose kernels write weights without raising `_version`.

    Nothing on the tensors tells of their steps, so that every step of such an optimizer anywhere
    counts as a change of all weights.
    """

    steps = 0

    @classmethod
    def count_step(cls, optimizer: Optimizer, *_: Any) -> None:
        """Count a step if the optimizer is fused."""
        cls.steps += any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_FusedOptimizers.count_step)

# Several threads may call the same ensemble: one must not fold a layer's weights anew while another
# prepares parts of the old ones.
_PREPARING = threading.RLock()


class Prepared(nn.Module):
    """An operation with prepared weights.

    A change is noticed by the address of a tensor (replaced, moved to another device or type) or by
    its `_version`, which PyTorch raises with every write in place. Comparing the values instead
    would cost more than preparing saves.

    Args:
        sources: modules and the names of those of their tensors that the weights come from, or
            whose change tells of one.
    """

    def __init__(self, sources: Sequence[tuple[nn.Module, Sequence[str]]]) -> None:
        super().__init__()
        # Tables and names instead of tensors, since a tensor may be replaced by another. A name in
        # neither table is a parametrized weight, which `refresh` then misses and refuses.
        self._entries = [
            (module._buffers if name in module._buffers else module._parameters, name)
            for module, names in sources
            for name in names
        ]
        self.forget()

    def forget(self) -> None:
        """Drop the prepared weights; they are prepared again when needed."""
        self._versions: list[tuple[int, int]] = []
        self._setting: Any = None
        self._sources: list[Tensor] = []
        self._folded: Weights | None = None
        self._cache: dict[Any, Weights] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare their own weights."""
        empty: dict[str, Any] = {"_versions": [], "_sources": [], "_folded": None, "_cache": {}}
        return {**self.__dict__, **empty}

    def fold(self) -> Weights:
        """The weight and bias of all branches."""
        raise NotImplementedError

    def refresh(self, setting: Any = None) -> bool:
        """Fold again if a tensor was replaced, moved or written to, or the setting changed.

        Args:
            setting: what else the folded weights depend on.

        Returns:
            Whether the folded weights may be used: not where changes cannot be noticed.
        """
        try:
            entries = [table[name] for table, name in self._entries]
            sources = [tensor for tensor in entries if tensor is not None]
            versions = [(tensor.data_ptr(), tensor._version) for tensor in sources]
        except (RuntimeError, KeyError):
            # Tensors made in inference mode count no changes; parametrized ones are elsewhere.
            return False
        setting = _FusedOptimizers.steps, setting
        if versions != self._versions or setting != self._setting:
            with _PREPARING, torch.no_grad():
                self._folded, self._cache = self.fold(), {}
                # While the sources are referred to, no new tensor can get the address of one that
                # was replaced, and with it pass for the old one.
                self._sources = [tensor.detach() for tensor in sources]
                self._versions, self._setting = versions, setting
        return True

    def cached(self, key: Any, prepare: Callable[..., Weights]) -> Weights:
        """Weights prepared for a use, as `prepare(weight, bias, *key)` makes them the first time.

        Args:
            key: arguments that tell uses apart.
            prepare: its result is cached until the next fold, or until newer ones need the room.
        """
        weights = self._cache.get(key)
        if weights is None:
            with _PREPARING:
                assert self._folded is not None
                weights = self._cache[key] = prepare(*self._folded, *key)
                self._drop_oldest(_CACHE_SIZE * self._folded[0].numel())
        return weights

    def _drop_oldest(self, limit: int) -> None:
        size = sum(weight.numel() for weight, _ in self._cache.values())
        while size > limit:
            weight, _ = self._cache.pop(next(iter(self._cache)))
            size -= weight.numel()


def suits_onednn(x: Tensor) -> bool:
    """Whether oneDNN's fused operations take this input; autocast would be lost on them."""
    if torch.is_autocast_enabled("cpu"):
        return False
    fits = x.is_cpu and x.dtype is torch.float32 and x.numel() > 0
    return fits and bool(torch._C._get_mkldnn_enabled())


def has_onednn() -> bool:
    """Whether oneDNN was built into PyTorch."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
