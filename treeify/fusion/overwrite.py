"""Sums and activations written over a new tensor that nothing else reads."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from treeify.tree import Span


@dataclass(frozen=True)
class Activation:
    """An activation that may overwrite its input.

    Args:
        apply: overwrites its argument and returns it.
        name: what oneDNN calls it; empty where it is done afterwards.
        scalars: oneDNN's parameters of it.
        algorithm: oneDNN's way to compute it; empty where there is one way only.
    """

    apply: Callable[[Tensor], Tensor]
    name: str = ""
    scalars: list[float] = field(default_factory=list)
    algorithm: str = ""


def attributes(activation: Activation | None) -> tuple[str, list[float], str]:
    """What oneDNN's operations take to compute an activation in the same pass, or none."""
    if activation is None or not activation.name:
        return "none", [], ""
    return activation.name, activation.scalars, activation.algorithm


def finish(x: Tensor, addend: Tensor | float | None, activation: Activation | None) -> Tensor:
    """Add and activate, written over `x`; a sum only where shapes and types allow."""
    if isinstance(addend, Tensor) and x.shape == addend.shape and x.dtype == addend.dtype:
        x = x.add_(addend)
    elif addend is not None:
        x = x + addend
    return x if activation is None else activation.apply(x)


class Overwrite(nn.Module):
    """An activation written over its input, which nothing else reads."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """The same shape."""
        return self.activation.apply(x)


class AddInto(nn.Module):
    """A sum written over its first operand, which nothing else reads."""

    def __init__(self, activation: Activation | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, span: Span, x: Tensor, addend: Tensor | float) -> Tensor:
        """The sum."""
        return finish(x, addend, self.activation)
