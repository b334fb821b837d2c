"""Operations that run as they stand: on packed tensors, or with branches moved to the batch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from treeify.tree import Span

Target = Callable[..., Any] | str


def call_target(target: Target, *args: Any, **kwargs: Any) -> Any:
    """Call a function, or the method of that name of the first argument."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


class TargetOperation(nn.Module):
    """An operation of a function, a module or, by its name, a tensor method."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target: Any = target

    def extra_repr(self) -> str:
        """The target, for printing a segment."""
        return getattr(self.target, "__name__", str(self.target))


class Direct(TargetOperation):
    """Runs a function, module or tensor method on packed tensors as it stands."""

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The target's own result."""
        return call_target(self.target, *args, **kwargs)


class ToBatch(TargetOperation):
    """Runs an operation on packed tensors with their branches in the batch: `[N*G, C, ...]`.

    Right for anything that treats every image by itself, whatever it does to the other dims.
    """

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The packed result."""
        count = span.size

        # Image-major, unlike a value that stays in the batch: so the reshape there and back is a
        # view of channels that lie in order, where branch-major would copy.
        def to_batch(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.reshape(leaf.shape[0] * count, leaf.shape[1] // count, *leaf.shape[2:])

        def from_batch(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.reshape(leaf.shape[0] // count, count * leaf.shape[1], *leaf.shape[2:])

        batch_args, batch_kwargs = tree_map(to_batch, (args, kwargs))
        return tree_map(from_batch, call_target(self.target, *batch_args, **batch_kwargs))
