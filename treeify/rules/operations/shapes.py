"""Operations that read or make shapes: sizes within them are those of one branch."""

from typing import Any

from torch import Tensor, nn

from treeify.rules.operations.direct import Target, TargetOperation, call_target
from treeify.tree import Span


class BranchShape(TargetOperation):
    """Reads what the base model would of a shape with branches in `dim`: `C`, not `G*C`."""

    def __init__(self, target: Target, dim: int) -> None:
        super().__init__(target)
        self.dim = dim

    def forward(self, span: Span, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The target applied to a branch's view of the tensor."""
        size = x.shape[self.dim] // span.size
        return call_target(self.target, x.narrow(self.dim, 0, size), *args, **kwargs)


class Reshape(nn.Module):
    """A reshape that keeps the batch: within a branch it becomes one of the packed tensor."""

    def forward(self, span: Span, x: Tensor, *shape: Any) -> Tensor:
        """`[N, G*C, ...] -> [N, G*D, ...]` where the base model makes `[N, D, ...]`."""
        sizes = _sizes(shape)
        sizes[0] = x.shape[0]
        if sizes[1] != -1:
            sizes[1] = sizes[1] * span.size  # not in place: while torch traces, sizes are tensors
        return x.reshape(sizes)


class ExpandEach(TargetOperation):
    """Expands a tensor of each branch to all its images, in `dim`, where the tensor is 1 long."""

    def __init__(self, target: Target, dim: int) -> None:
        super().__init__(target)
        self.dim = dim

    def forward(self, span: Span, stacked: Tensor, *sizes: Any) -> Tensor:
        """`[G, 1, ...] -> [G*N, ...]`."""
        branches = stacked.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        shape = _sizes(sizes)
        images = shape[self.dim] // span.size
        shape[self.dim] = -1 if self.target == "expand" else 1
        expanded: Tensor = call_target(self.target, branches, *shape)
        return expanded.repeat_interleave(images, self.dim)


def _sizes(sizes: tuple[Any, ...]) -> list[Any]:
    """Sizes given one by one or as one sequence."""
    return list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)


class Element(nn.Module):
    """Picks an element of what another operation returned."""

    def forward(self, span: Span, values: Any, index: Any) -> Any:
        """An element of a sequence or mapping of packed tensors."""
        return values[index]
