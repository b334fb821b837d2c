"""Dispatch modes that measure what runs inside of them."""

from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Macs(TorchDispatchMode):
    """Counts the multiply-accumulates of convolutions and matrix products as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "convolution" in name:
            self.total += result.numel() * (args[1].numel() // result.shape[1])
        elif name in ("mm", "bmm"):
            self.total += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.total += args[1].numel() * args[2].shape[-1]
        return result


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive; their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, before)
        return result

    def _note(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.live:
            if key in before:
                return  # a view of a parameter or of the user's images
            self.live[key] = [0, size]
            self.now += size
            self.peak = max(self.peak, self.now)
        self.live[key][0] += 1
        finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self.live[key]
