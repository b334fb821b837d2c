"""Operations that treat every element by itself: the packed tensor goes straight through."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import timm.layers.activations as timm_act
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from treeify.engine.forms import merge_branches, split_branches
from treeify.engine.packed_tensors import lookup, narrow
from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.widened import widened
from treeify.rules.table import batch_rule, rule, widens
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Softplus, nn.Softsign),
    *(nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Identity),
    *(timm_act.Swish, timm_act.Mish, timm_act.Sigmoid, timm_act.Tanh, timm_act.HardSwish),
    *(timm_act.HardSigmoid, timm_act.HardMish, timm_act.GELU, timm_act.GELUTanh),
    timm_act.QuickGELU,
)
_UNARY: tuple[Any, ...] = (
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid),
    *(F.tanh, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign, F.logsigmoid),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.square, torch.abs, torch.neg, torch.sin, torch.cos, torch.erf, torch.clamp),
    *(torch.reciprocal, operator.neg, operator.pos),
    *("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg", "clamp"),
    *("clamp_min", "clamp_max", "reciprocal", "contiguous", "clone", "detach", "float", "half"),
    *("bfloat16", "double", "long", "int", "bool", "to", "type", "sin", "cos", "erf"),
)
_BROADCAST: tuple[Any, ...] = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow),
    *(operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.minimum),
    *(torch.where, torch.addcmul, torch.lerp),
    *("add", "sub", "mul", "div", "pow", "maximum", "minimum", "addcmul", "lerp"),
    *("masked_fill", "type_as"),
)


@widens(*ACTIVATIONS)
def pack_activation(activation: nn.Module, branches: int) -> None:
    """An activation is the same for any number of channels."""


rule(*ACTIVATIONS, pure=True)(widened)


class Direct(nn.Module):
    """Runs a function or tensor method on packed tensors as it stands."""

    def __init__(self, target: Callable[..., Any] | str) -> None:
        super().__init__()
        self.target = target

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The target's own result."""
        return call_target(self.target, *args, **kwargs)

    def extra_repr(self) -> str:
        """The target, for printing a segment."""
        return getattr(self.target, "__name__", str(self.target))


def call_target(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """Call a function, or the method of that name of the first argument."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


# Their bounds may be tensors.
_BOUNDED = (torch.clamp, "clamp", "clamp_min", "clamp_max")


@rule(*_UNARY, pure=True)
def pack_unary(call: Call) -> nn.Module:
    """One tensor in, the same shape out."""
    if len(call.tensor_arguments()) != 1:
        if call.node.target in _BOUNDED:
            return pack_broadcast(call)
        raise Unpackable("it reads more than one tensor")
    _require_own_layout(call)
    return Direct(call.node.target)


def _require_own_layout(call: Call) -> None:
    """Refuse memory formats for stacked tensors, which have one dim more than in the base model."""
    given = (*call.node.args, *call.node.kwargs.values())
    asked = any(own in (torch.channels_last, torch.channels_last_3d) for own in given)
    if asked and not all(fact.branch_dim == 1 for fact in call.facts.tensors):
        raise Unpackable("it lays out a tensor without a batch")


@batch_rule(*_UNARY, pure=True)
def run_unary(call: Call) -> nn.Module:
    """The same in the batch."""
    if call.node.target in _BOUNDED and len(call.tensor_arguments()) != 1:
        return run_broadcast(call)
    call.require_one_tensor()
    return Direct(call.node.target)


@batch_rule(*ACTIVATIONS, pure=True)
def run_activation(call: Call) -> Direct:
    """Activations in the batch."""
    call.batch_facts()
    return Direct(call.packed_module)


class Broadcast(nn.Module):
    """Runs an element-wise operation whose operands broadcast in a way packing would disturb.

    Operands become `[N, G, ...]`, so that each branch broadcasts as in the base model.

    Args:
        target: the operation.
        operands: facts of the positional arguments; None for what is no tensor.
        rank: rank of the base model's result.
        branch_dim: of the result: 1 where it is packed, 0 where branches are stacked.
        shared: for each positional argument, whether it is one value for all branches.
    """

    def __init__(
        self,
        target: Callable[..., Any] | str,
        operands: tuple[TensorFacts | None, ...],
        rank: int,
        *,
        branch_dim: int,
        shared: tuple[bool, ...],
    ) -> None:
        super().__init__()
        self.target, self.operands, self.rank = target, operands, rank
        self.branch_dim = branch_dim
        self.shared = shared

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Tensor:
        """The operation's result, packed."""
        aligned = [
            self._align(arg, known, span.size, shared=shared)
            for arg, known, shared in zip(args, self.operands, self.shared, strict=True)
        ]
        aligned = _as_numbers(aligned, self.operands)
        result: Tensor = call_target(self.target, *aligned, **kwargs)
        return merge_branches(result) if self.branch_dim == 1 else result

    def _align(self, arg: Any, known: TensorFacts | None, count: int, *, shared: bool) -> Any:
        if known is None:
            return arg
        if shared and not known.shape:
            return arg[0]
        if known.branch_dim == 1:
            return split_branches(arg, count)
        missing = [1] * (self.rank - len(known.shape))
        base = (*missing, *arg.shape[1:])
        # A value without a batch broadcasts over it: its place at dim 0 goes to the branches.
        return (
            arg.reshape(1, count, *base[1:]) if self.branch_dim == 1 else arg.reshape(count, *base)
        )


def _as_numbers(values: list[Any], operands: Sequence[TensorFacts | None]) -> list[Any]:
    """Tensors without dims in the base model leave the others' dtype alone, as they do there."""
    kinds = [
        (value.dtype, known is not None and not known.shape)
        for value, known in zip(values, operands, strict=True)
        if isinstance(value, Tensor)
    ]
    dtypes = {dtype for dtype, is_number in kinds if not is_number}
    if not dtypes or all(dtype in dtypes for dtype, _ in kinds):
        return values
    wide = torch.empty(1, dtype=reduce(torch.promote_types, dtypes), device="meta")

    def cast(value: Any, known: TensorFacts | None) -> Any:
        if not isinstance(value, Tensor) or known is None or known.shape:
            return value
        number = torch.empty((), dtype=value.dtype, device="meta")
        return value.to(torch.result_type(wide, number))

    return [cast(value, known) for value, known in zip(values, operands, strict=True)]


def _require_number(call: Call, operands: Sequence[TensorFacts | None]) -> None:
    """Raise Unpackable if a mask is filled with numbers that differ between branches."""
    if call.node.target == "masked_fill":
        for argument, known in zip(call.node.args[1:], operands[1:], strict=True):
            if known is not None and not known.shape and argument in call.varying:
                raise Unpackable("it takes one number to fill in")


@rule(*_BROADCAST, pure=True)
def pack_broadcast(call: Call) -> nn.Module:
    """Element-wise operations of several operands, scalars and parameters included."""
    operands = tuple(call.tensor(arg) for arg in call.node.args)
    if any(isinstance(value, fx.Node) for value in call.node.kwargs.values()):
        raise Unpackable("an operand is given by keyword")
    if not isinstance(call.facts.value, TensorFacts):
        raise Unpackable("its result is no tensor")
    result = call.facts.value
    _require_number(call, operands)
    found = [known for known in operands if known is not None]
    if all(known.branch_dim == 1 and known.shape[1] == result.shape[1] for known in found) and (
        {len(known.shape) for known in found} == {len(result.shape)}
    ):
        return Direct(call.node.target)
    for known in found:
        fits = len(known.shape) < len(result.shape) or (known.shape or (1,))[0] == 1
        same_rank = len(known.shape) == len(result.shape)
        if (result.branch_dim == 1 and not (known.branch_dim == 1 and same_rank) and not fits) or (
            known.branch_dim == 1 and not (same_rank and result.branch_dim == 1)
        ):
            raise Unpackable("its operands broadcast across the batch")
    return Broadcast(
        call.node.target,
        operands,
        len(result.shape),
        branch_dim=result.branch_dim,
        shared=tuple(argument not in call.varying for argument in call.node.args),
    )


class BroadcastInBatch(nn.Module):
    """Runs an element-wise operation on branches in the batch and parameters of each branch.

    Operands become `[..., G, N, ...]`, so that each branch broadcasts as in the base model.

    Args:
        target: the operation.
        operands: for each positional argument its `TensorFacts` where it differs from branch to
            branch; None for what is no tensor or the same for all branches.
        result: facts of the base model's result.
    """

    def __init__(
        self,
        target: Callable[..., Any] | str,
        operands: tuple[TensorFacts | None, ...],
        result: TensorFacts,
    ) -> None:
        super().__init__()
        assert result.batch_dim is not None
        self.target, self.operands = target, operands
        self.rank, self.dim = len(result.shape), result.batch_dim

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Tensor:
        """`[G*N, ...]`."""
        aligned = [
            self._align(arg, known, span.size)
            for arg, known in zip(args, self.operands, strict=True)
        ]
        aligned = _as_numbers(aligned, self.operands)
        result: Tensor = call_target(self.target, *aligned, **kwargs)
        return result.flatten(self.dim, self.dim + 1)

    def _align(self, arg: Any, known: TensorFacts | None, count: int) -> Any:
        if known is None:
            batch = self.dim + arg.ndim - self.rank if isinstance(arg, Tensor) else -1
            # The batch is two dims now: what reaches beyond it needs one more, and has 1 there.
            return arg.unsqueeze(batch) if batch >= 0 else arg
        if known.batch_dim is not None:
            images = arg.shape[known.batch_dim] // count
            return torch.unflatten(arg, known.batch_dim, (count, images))
        missing = [1] * (self.rank - len(known.shape))
        whole = arg.reshape(count, *missing, *arg.shape[1:])
        return whole.movedim(0, self.dim)


@batch_rule(*_BROADCAST, pure=True)
def run_broadcast(call: Call) -> nn.Module:
    """Element-wise operations in the batch, with scalars, constants and parameters."""
    result = call.facts.value
    if not isinstance(result, TensorFacts) or result.batch_dim is None:
        raise Unpackable("its result has no batch dim")
    if any(call.tensor(value) for value in call.node.kwargs.values()):
        raise Unpackable("an operand is given by keyword")
    operands = [call.tensor(argument) for argument in call.node.args]
    if not any(known is not None and known.batch_dim is not None for known in operands):
        raise Unpackable("none of its operands has a batch dim")
    _require_number(call, operands)
    require_aligned(operands, result)
    return with_parameters(call, call.node.target, operands, result)


def require_aligned(operands: Sequence[TensorFacts | None], result: TensorFacts) -> None:
    """Raise Unpackable unless operands hold the batch where the result does, or 1 there."""
    assert result.batch_dim is not None
    from_right = len(result.shape) - result.batch_dim
    for known in operands:
        if known is None:
            continue
        if known.batch_dim is not None:
            same = known.shape[known.batch_dim] == result.shape[result.batch_dim]
            if len(known.shape) - known.batch_dim != from_right or not same:
                raise Unpackable("its operands hold the batch in different dims")
        elif len(known.shape) >= from_right and known.shape[-from_right] != 1:
            raise Unpackable("its operands broadcast across the batch")


def with_parameters(
    call: Call, target: Any, operands: Sequence[TensorFacts | None], result: TensorFacts
) -> nn.Module:
    """The operation in the batch, as it stands where no operand is a parameter of each branch."""
    own = [argument in call.varying for argument in call.node.args]
    pairs = list(zip(operands, own, strict=True))
    if not any(known is not None and known.batch_dim is None and mine for known, mine in pairs):
        return Direct(call.node.target)
    differing = [
        known if known is not None and (mine or known.batch_dim is not None) else None
        for known, mine in pairs
    ]
    return BroadcastInBatch(target, tuple(differing), result)


class PackedPReLU(nn.Module):
    """PReLU with each branch's own slope, one for all channels or one per channel."""

    def __init__(self, storage: nn.Module, branches: int) -> None:
        super().__init__()
        self.storage, self.branches = storage, branches

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, ...] -> [N, G*C, ...]`."""
        weight = narrow(get_tensor(self.storage, "weight"), self.branches, span)
        return F.prelu(x, weight.repeat_interleave(x.shape[1] // weight.shape[0]))


@rule(nn.PReLU)
def pack_prelu(call: Call) -> PackedPReLU:
    """PReLU."""
    call.input_facts()
    return PackedPReLU(call.packed_module, call.branches)
