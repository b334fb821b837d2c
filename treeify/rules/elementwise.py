"""Operations that treat every element by itself: packed tensors go straight through."""

import operator
from collections.abc import Sequence
from typing import Any

import timm.layers.activations as timm_act
import torch
import torch.nn.functional as F
from torch import fx, nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.broadcast import Broadcast, BroadcastInBatch
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.packed import PackedPReLU
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged, widened
from treeify.tracing.facts import TensorFacts

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Softplus, nn.Softsign),
    *(nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Identity),
    *(timm_act.Swish, timm_act.Mish, timm_act.Sigmoid, timm_act.Tanh, timm_act.HardSwish),
    *(timm_act.HardSigmoid, timm_act.HardMish, timm_act.GELU, timm_act.GELUTanh),
    timm_act.QuickGELU,
)


widens(*ACTIVATIONS)(unchanged)
rule(*ACTIVATIONS, pure=True)(widened)


@batch_rule(*ACTIVATIONS, pure=True)
def run_activation(call: Call) -> Direct:
    """Activations in the batch."""
    call.batch_facts()
    return Direct(call.target)


@rule(nn.PReLU)
def pack_prelu(call: Call) -> PackedPReLU:
    """PReLU, whose slopes each branch has of its own."""
    call.input_facts()
    return PackedPReLU(call.packed_module, call.branches)


# Their bounds may be tensors.
_BOUNDED = (torch.clamp, "clamp", "clamp_min", "clamp_max")
_UNARY: tuple[Any, ...] = (
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid),
    *(F.tanh, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign, F.logsigmoid),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.square, torch.abs, torch.neg, torch.sin, torch.cos, torch.erf, torch.reciprocal),
    *(operator.neg, operator.pos),
    *("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg"),
    *("reciprocal", "contiguous", "clone", "detach", "float", "half", "bfloat16", "double"),
    *("long", "int", "bool", "to", "type", "sin", "cos", "erf"),
)
_BROADCAST: tuple[Any, ...] = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow),
    *(operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.minimum),
    *(torch.where, torch.addcmul, torch.lerp),
    *("add", "sub", "mul", "div", "pow", "maximum", "minimum", "addcmul", "lerp"),
    *("masked_fill", "type_as"),
)
_ACROSS_BATCH = "its operands broadcast across the batch"
_BY_KEYWORD = "an operand is given by keyword"


@rule(*_UNARY, *_BOUNDED, pure=True)
def pack_unary(call: Call) -> nn.Module:
    """One tensor in, the same shape out."""
    if len(call.tensor_arguments()) != 1:
        if call.target in _BOUNDED:
            return pack_broadcast(call)
        raise Unpackable("it reads more than one tensor")
    _require_memory_format(call)
    return Direct(call.target)


def _require_memory_format(call: Call) -> None:
    """Refuse memory formats for stacked tensors, which have one dim more than in the base model."""
    arguments = (*call.node.args, *call.node.kwargs.values())
    formats = (torch.channels_last, torch.channels_last_3d)
    if not any(argument in formats for argument in arguments):
        return
    if any(result.branch_dim != 1 for result in call.facts.tensors):
        raise Unpackable("it gives a memory format to a tensor without a batch")


@batch_rule(*_UNARY, *_BOUNDED, pure=True)
def run_unary(call: Call) -> nn.Module:
    """One tensor in, the same shape out, in the batch."""
    if call.target in _BOUNDED and len(call.tensor_arguments()) != 1:
        return run_broadcast(call)
    call.require_one_tensor()
    return Direct(call.target)


@rule(*_BROADCAST, pure=True)
def pack_broadcast(call: Call) -> Direct | Broadcast:
    """Element-wise operations of several operands, scalars and parameters included."""
    arguments = call.node.args
    operands = [call.tensor(argument) for argument in arguments]
    if any(isinstance(value, fx.Node) for value in call.node.kwargs.values()):
        raise Unpackable(_BY_KEYWORD)
    result = call.facts.value
    if not isinstance(result, TensorFacts):
        raise Unpackable("its result is not a tensor")
    _require_number(call, operands)
    tensors = [operand for operand in operands if operand is not None]
    if tensors and all(
        tensor.branch_dim == 1
        and len(tensor.shape) == len(result.shape)
        and tensor.shape[1] == result.shape[1]
        for tensor in tensors
    ):
        return Direct(call.target)
    for tensor in tensors:
        same_rank = len(tensor.shape) == len(result.shape)
        if tensor.branch_dim == 1:
            fits = same_rank and result.branch_dim == 1
        else:  # stacked: its first dim must not meet the batch of the result
            lower = len(tensor.shape) < len(result.shape) or (tensor.shape or (1,))[0] == 1
            fits = result.branch_dim == 0 or lower
        if not fits:
            raise Unpackable(_ACROSS_BATCH)
    shared = [argument not in call.varying for argument in arguments]
    return Broadcast(call.target, operands, result, shared)


@batch_rule(*_BROADCAST, pure=True)
def run_broadcast(call: Call) -> Direct | BroadcastInBatch:
    """Element-wise operations in the batch, with scalars, constants and parameters."""
    result = call.result_facts()
    if any(call.tensor(value) for value in call.node.kwargs.values()):
        raise Unpackable(_BY_KEYWORD)
    operands = [call.tensor(argument) for argument in call.node.args]
    if not any(operand is not None and operand.batch_dim is not None for operand in operands):
        raise Unpackable("none of its operands has a batch dim")
    _require_number(call, operands)
    require_aligned(operands, result)
    return run_with_parameters(call, call.target, operands, result)


def _require_number(call: Call, operands: Sequence[TensorFacts | None]) -> None:
    """Raise Unpackable if a mask is filled with numbers that differ between branches."""
    if call.target == "masked_fill":
        for argument, operand in zip(call.node.args[1:], operands[1:], strict=True):
            if operand is not None and not operand.shape and argument in call.varying:
                raise Unpackable("it fills in a number that differs from branch to branch")


def require_aligned(operands: Sequence[TensorFacts | None], result: TensorFacts) -> None:
    """Raise Unpackable unless operands hold the batch where the result does, or 1 there."""
    assert result.batch_dim is not None
    from_right = len(result.shape) - result.batch_dim
    for operand in operands:
        if operand is None:
            continue
        if operand.batch_dim is not None:
            same_size = operand.shape[operand.batch_dim] == result.shape[result.batch_dim]
            if len(operand.shape) - operand.batch_dim != from_right or not same_size:
                raise Unpackable("its operands hold the batch in different dims")
        elif len(operand.shape) >= from_right and operand.shape[-from_right] != 1:
            raise Unpackable(_ACROSS_BATCH)


def run_with_parameters(
    call: Call, target: Any, operands: Sequence[TensorFacts | None], result: TensorFacts
) -> Direct | BroadcastInBatch:
    """The operation in the batch, as it stands where no operand is a parameter of each branch.

    Where one is, `target` computes the result. Operands are aligned, see `require_aligned`.
    """
    pairs = list(zip(operands, (arg in call.varying for arg in call.node.args), strict=True))
    if not any(operand and operand.batch_dim is None and varies for operand, varies in pairs):
        return Direct(call.target)
    differing = [
        operand if operand and (varies or operand.batch_dim is not None) else None
        for operand, varies in pairs
    ]
    return BroadcastInBatch(target, differing, result)
