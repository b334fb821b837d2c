"""A limit on what building a model may allocate, where somebody else chose how large it is."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from treeify.errors import ModelError

# What makes tensors of a size, and what makes as many numbers as it is told.
_SIZED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
_COUNTED = frozenset({torch.arange, torch.linspace, torch.eye, torch.randperm})
# What grows by being broadcast, in tables of positions.
_PAIRWISE = frozenset(
    {
        *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.__rsub__, Tensor.__rtruediv__),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.where),
        *(
            Tensor.eq,
            Tensor.ne,
            Tensor.__eq__,
            Tensor.__ne__,
            Tensor.lt,
            Tensor.gt,
            Tensor.le,
            Tensor.ge,
        ),
    }
)
# Tables of positions, masks and layers that a constructor replaces are in no file.
_VALUES_BESIDE, _TENSORS_BESIDE = 2**26, 2_000


class MemoryLimit(TorchFunctionMode):
    """While entered, tensors are refused before they take more memory than saved ones explain.

    A layer asks torch for its weights, so a width of 10^12 or 10^9 layers end at the limit.

    Args:
        values: how many numbers the saved tensors hold.
        tensors: how many saved tensors there are.

    Raises:
        ModelError: within, when more is asked for.
    """

    def __init__(self, values: int, tensors: int) -> None:
        super().__init__()
        # The base model, its branches, and what constructors throw away.
        self.values = 4 * values + _VALUES_BESIDE
        self.tensors = 10 * tensors + _TENSORS_BESIDE
        self._remaining = [self.values, self.tensors]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIZED or func in _COUNTED:
            if torch.device(kwargs.get("device") or "cpu").type != "meta":
                self._allocate(_size(func, args, kwargs), 1)
        elif func in _PAIRWISE:
            # Differences of all pairs are as large as both together.
            self._allocate(_broadcast_size(args), 0)
        return func(*args, **kwargs)

    def _allocate(self, values: int, tensors: int) -> None:
        if values <= self.values:
            # What is computed on the way is given back; only what is asked for adds up.
            self._remaining[0] -= values if tensors else 0
            self._remaining[1] -= tensors
        if values > self.values or min(self._remaining) < 0:
            raise ModelError(
                "the model takes far more memory than its saved tensors.",
                expected=f"at most {self.values:,} numbers in {self.tensors:,} tensors, by the"
                " size of the file of weights",
                found=f"a tensor of {values:,} numbers, after others"
                if values
                else "more tensors than that",
            )


def _size(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many numbers a factory function is asked for, or a little more."""
    if func in _COUNTED:
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int | float)]
        return int(max([1, *(abs(number) for number in numbers if abs(number) < 2**63)]))
    size = args or (kwargs.get("size", ()),)
    return prod(_integers(size[:1] if isinstance(size[0], tuple | list) else size))


def _integers(values: Any) -> Iterator[int]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _integers(value)
        elif isinstance(value, int):
            yield max(value, 0)


def _broadcast_size(args: tuple[Any, ...]) -> int:
    """How many numbers the tensors among some arguments are when broadcast; 0 if they are not."""
    shapes = [arg.shape for arg in args if isinstance(arg, Tensor) and not arg.is_meta]
    try:
        return prod(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError:  # they are of another operation
        return 0
