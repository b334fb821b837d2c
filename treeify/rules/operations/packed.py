"""What operations share that read the tensors of a packed module themselves."""

from __future__ import annotations

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
        """The part of a tensor that belongs to a span of branches, a view; None if there is none.

        Args:
            span: the branches.
            name: of the tensor, dotted if a submodule holds it.
        """
        path, _, attribute = name.rpartition(".")
        tensor = getattr(self.packed_module.get_submodule(path), attribute, None)
        return None if tensor is None else narrow(tensor, self.branches, span)

    def weight_and_bias(self, span: Span) -> tuple[Tensor | None, Tensor | None]:
        """The parts of the weight and the bias that belong to a span of branches."""
        return self.part(span, "weight"), self.part(span, "bias")
