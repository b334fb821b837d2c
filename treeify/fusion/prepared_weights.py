"""Weights prepared once for the processor, that follow the tensors they come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Weights = tuple[Tensor, Tensor | None]
# Prepared weights kept per layer, as a multiple of the weights themselves: one set for full calls,
# the others for single branches and parts. Beyond it the oldest are dropped.
_KEPT = 4
# Multiply-accumulates of one branch's product below which plain PyTorch is faster than oneDNN.
SMALL = 16e6


class _FusedSteps:
    """Steps of optimizers with `fused=True`, which change weights without counting a change."""

    taken = 0

    @classmethod
    def note(cls, optimizer: Optimizer, *_: Any) -> None:
        """Count a step that an optimizer has taken."""
        cls.taken += any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_FusedSteps.note)

# Held while weights are prepared: several threads may call the same ensemble.
_PREPARING = threading.RLock()


class Prepared(nn.Module):
    """An operation with prepared weights.

    Args:
        sources: modules and the names of those of their tensors that the weights come from, or
            whose change tells of one.
    """

    def __init__(self, sources: Sequence[tuple[nn.Module, Sequence[str]]]) -> None:
        super().__init__()
        self._places = [place for module, names in sources for place in _places(module, names)]
        self.forget()

    def forget(self) -> None:
        """Drop the prepared weights; they are prepared again when needed."""
        self._seen: list[tuple[int, int]] = []
        self._setting: Any = None
        self._sources: list[Tensor] = []
        self._folded: Weights | None = None
        self._parts: dict[Any, Weights] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare their own weights."""
        nothing: dict[str, Any] = {"_seen": [], "_sources": [], "_folded": None, "_parts": {}}
        return {**self.__dict__, **nothing}

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
            found = [table[name] for table, name in self._places]
            seen = [(tensor.data_ptr(), tensor._version) for tensor in found if tensor is not None]
        except (RuntimeError, KeyError):
            # Tensors made in inference mode count no changes; parametrized ones are elsewhere.
            return False
        setting = _FusedSteps.taken, setting
        if seen != self._seen or setting != self._setting:
            with _PREPARING, torch.no_grad():
                self._folded, self._parts = self.fold(), {}
                # Holding on to the sources keeps their addresses from being given to others.
                self._sources = [tensor.detach() for tensor in found if tensor is not None]
                self._seen, self._setting = seen, setting
        return True

    def kept(self, key: Any, prepare: Callable[..., Weights]) -> Weights:
        """Weights prepared for a use, as `prepare(weight, bias, *key)` makes them the first time.

        Args:
            key: arguments that tell uses apart.
            prepare: its result is kept until the next fold, or until newer ones need the room.
        """
        found = self._parts.get(key)
        if found is None:
            with _PREPARING:
                assert self._folded is not None
                found = self._parts[key] = prepare(*self._folded, *key)
                self._drop_oldest(_KEPT * self._folded[0].numel())
        return found

    def _drop_oldest(self, limit: int) -> None:
        held = sum(weight.numel() for weight, _ in self._parts.values())
        while held > limit:
            weight, _ = self._parts.pop(next(iter(self._parts)))
            held -= weight.numel()


def _places(module: nn.Module, names: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """Where a module's tensors are found, whatever they are replaced by."""
    # A name in neither table is a parametrized weight, which `refresh` then misses and refuses.
    tables = (module._buffers, module._parameters)
    return [(next((own for own in tables if name in own), tables[1]), name) for name in names]


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN's fused operations take this input; autocast would be lost on them."""
    if torch.is_autocast_enabled("cpu"):
        return False
    fits = x.is_cpu and x.dtype is torch.float32 and x.numel() > 0
    return fits and bool(torch._C._get_mkldnn_enabled())


def has_onednn() -> bool:
    """Whether oneDNN was built into PyTorch."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
