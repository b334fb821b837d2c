"""Whether an ensemble's packed tensors fit into memory, before any is allocated."""

from collections.abc import Mapping

import psutil
import torch
from torch import Tensor

from treeify.engine.packed_tensors import Slot
from treeify.errors import SplitError
from treeify.tree import Tree

# Leaves get their weights one by one: more of them take hours, however small they are.
_MOST_LEAVES = 2**16


def packed_bytes(slots: Mapping[str, Slot], tree: Tree, like: Mapping[str, Tensor]) -> int:
    """Bytes of all packed tensors; those tied in the base model, `like`, count once."""
    # By identity; of the names of a tied tensor any will do, as they are of one slot.
    sizes = {
        id(tensor): tensor.numel() * tensor.element_size() * tree.branches[slots[key].level]
        for key, tensor in like.items()
    }
    return sum(sizes.values())


def require_memory(slots: Mapping[str, Slot], tree: Tree, like: Mapping[str, Tensor]) -> None:
    """Refuse an ensemble whose packed tensors do not fit; without values they do.

    Args:
        slots: where every tensor is packed.
        tree: the ensemble's shape.
        like: tensors of the base model, by their keys.

    Raises:
        SplitError: they take more memory than there is, or there are too many leaves.
    """
    devices = {tensor.device for tensor in like.values()} - {torch.device("meta")}
    needed = packed_bytes(slots, tree, like)
    room = min(map(free_bytes, devices), default=needed)
    if needed <= room and (tree.leaves <= _MOST_LEAVES or not devices):
        return
    raise SplitError(
        "the ensemble is too large.",
        expected=f"at most {room:,} bytes, which are free, and {_MOST_LEAVES:,} leaves",
        found=f"{needed:,} bytes of weights, {tree.leaves:,} leaves",
        next_step="Choose a smaller fanout, fewer splits, or splits closer to the output.",
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that a device has left; what the system can get free counts."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reserved)
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)
