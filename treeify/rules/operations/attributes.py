"""Tensors that the base model reads as attributes: parameters, buffers and constants."""

from typing import Any

import torch
from torch import Tensor, nn

from treeify.engine.forms import Form
from treeify.engine.packed_tensors import Slot, get_parent, get_tensor, narrow
from treeify.tree import Span


class ReadTensor(nn.Module):
    """Reads a parameter or buffer that the base model uses directly.

    A level reads it in the base model's own shape if `form` is shared, else stacked, `[G, ...]`.
    """

    def __init__(
        self, root: nn.Module, slot: Slot, branches: tuple[int, ...], level: int, form: Form
    ) -> None:
        super().__init__()
        # In a tuple, so that the ensemble does not become a submodule of its own segment.
        self.parent = (get_parent(root, slot.key)[0],)
        self.name = slot.key.rpartition(".")[2]
        self.slot, self.branches, self.level, self.form = slot, branches, level, form

    def forward(self, span: Span) -> Tensor:
        """The tensor, for the branches of `span`."""
        packed = get_tensor(self.parent[0], self.name)
        slot_branches = self.branches[self.slot.level]
        if self.form is Form.SHARED:
            return self.slot.branch(packed, slot_branches, 0)
        ratio = self.branches[self.level] // slot_branches
        parents = span.parents(ratio)
        part = narrow(packed, slot_branches, parents)
        if not self.slot.scalar:
            part = torch.unflatten(part, 0, (parents.size, -1))
        if ratio == 1:
            return part
        return part[[branch // ratio - parents.start for branch in range(*span)]]

    def extra_repr(self) -> str:
        """The tensor's key, for printing a segment."""
        return self.slot.key


class Constant(nn.Module):
    """A tensor the base model holds outside its parameters and buffers."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = (value,)  # in a tuple, so that it does not become part of the state

    def forward(self, span: Span) -> Any:
        """The value."""
        return self.value[0]
