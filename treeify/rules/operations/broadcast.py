"""Element-wise operations and products whose operands broadcast in a way packing would disturb."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from treeify.engine.forms import merge_branches, split_branches
from treeify.rules.operations.direct import Target, TargetOperation, call_target
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


class Broadcast(TargetOperation):
    """Runs an element-wise operation on packed tensors, numbers and parameters.

    Operands become `[N, G, ...]`, so that each branch broadcasts as in the base model.

    Args:
        target: the operation.
        operands: facts of the positional arguments; None for what is no tensor.
        result: facts of the base model's result.
        shared: for each positional argument, whether it is one value for all branches.
    """

    def __init__(
        self,
        target: Target,
        operands: Sequence[TensorFacts | None],
        result: TensorFacts,
        shared: Sequence[bool],
    ) -> None:
        super().__init__(target)
        self.operands, self.shared = operands, shared
        self.rank, self.branch_dim = len(result.shape), result.branch_dim

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Tensor:
        """The operation's result, packed."""
        aligned = [
            self._align(arg, operand, span.size, shared=shared)
            for arg, operand, shared in zip(args, self.operands, self.shared, strict=True)
        ]
        aligned = _as_numbers(aligned, self.operands)
        result: Tensor = call_target(self.target, *aligned, **kwargs)
        return merge_branches(result) if self.branch_dim == 1 else result

    def _align(self, arg: Any, operand: TensorFacts | None, count: int, *, shared: bool) -> Any:
        if operand is None:
            return arg
        if shared and not operand.shape:
            return arg[0]
        if operand.branch_dim == 1:
            return split_branches(arg, count)
        missing = [1] * (self.rank - len(operand.shape))
        shape = (*missing, *arg.shape[1:])
        if self.branch_dim == 0:
            return arg.reshape(count, *shape)
        # A value without a batch broadcasts over it: its place at dim 0 goes to the branches.
        return arg.reshape(1, count, *shape[1:])


class BroadcastInBatch(TargetOperation):
    """Runs an operation on branches in the batch and parameters of each branch.

    Operands become `[..., G, N, ...]`, so that each branch broadcasts as in the base model.

    Args:
        target: the operation.
        operands: for each positional argument its `TensorFacts` where it differs from branch to
            branch; None for what is no tensor or the same for all branches.
        result: facts of the base model's result.
    """

    def __init__(
        self, target: Target, operands: Sequence[TensorFacts | None], result: TensorFacts
    ) -> None:
        super().__init__(target)
        assert result.batch_dim is not None
        self.operands = operands
        self.rank, self.dim = len(result.shape), result.batch_dim

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Tensor:
        """`[G*N, ...]`."""
        aligned = [
            self._align(arg, operand, span.size)
            for arg, operand in zip(args, self.operands, strict=True)
        ]
        aligned = _as_numbers(aligned, self.operands)
        result: Tensor = call_target(self.target, *aligned, **kwargs)
        return result.flatten(self.dim, self.dim + 1)

    def _align(self, arg: Any, operand: TensorFacts | None, count: int) -> Any:
        if operand is None:
            batch = self.dim + arg.ndim - self.rank if isinstance(arg, Tensor) else -1
            # The batch is two dims now: what reaches beyond it needs one more, and has 1 there.
            return arg.unsqueeze(batch) if batch >= 0 else arg
        if operand.batch_dim is not None:
            images = arg.shape[operand.batch_dim] // count
            return torch.unflatten(arg, operand.batch_dim, (count, images))
        missing = [1] * (self.rank - len(operand.shape))
        return arg.reshape(count, *missing, *arg.shape[1:]).movedim(0, self.dim)


def _as_numbers(values: list[Any], operands: Sequence[TensorFacts | None]) -> list[Any]:
    """Give what is a number in the base model the dtype of the result it would have there.

    PyTorch lets a tensor without dims leave the other operands' dtype alone. Stacked for the
    branches it has a dim, and would promote them.
    """
    kinds = [
        (value.dtype, operand is not None and not operand.shape)
        for value, operand in zip(values, operands, strict=True)
        if isinstance(value, Tensor)
    ]
    dtypes = {dtype for dtype, is_number in kinds if not is_number}
    if not dtypes or all(dtype in dtypes for dtype, _ in kinds):
        return values
    wide = torch.empty(1, dtype=reduce(torch.promote_types, dtypes), device="meta")

    def cast(value: Any, operand: TensorFacts | None) -> Any:
        if not isinstance(value, Tensor) or operand is None or operand.shape:
            return value
        number = torch.empty((), dtype=value.dtype, device="meta")
        return value.to(torch.result_type(wide, number))

    return [cast(value, operand) for value, operand in zip(values, operands, strict=True)]
