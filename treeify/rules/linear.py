"""Linear layers, matrix products and einsum: one batched product over the branches."""

import operator

import torch
import torch.nn.functional as F
from timm.layers.linear import Linear as TimmLinear
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import require_aligned, run_with_parameters
from treeify.rules.image_by_image import to_batch
from treeify.rules.operations.broadcast import BroadcastInBatch
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.linear import EinsumOfBranches, LinearFunction, PackedLinear
from treeify.rules.table import batch_rule, rule


@batch_rule(nn.Linear, TimmLinear, first=True)
def run_linear(call: Call) -> PackedLinear:
    """Linear layers on `[N, ..., I]`."""
    call.batch_first_facts(least_rank=2)
    return PackedLinear(call.packed_module, call.branches)


@batch_rule(F.linear, first=True)
def run_linear_function(call: Call) -> LinearFunction:
    """`F.linear` on `[N, ..., I]` with each branch's own weight and bias."""
    call.batch_first_facts(least_rank=2)
    weight, bias = call.branch_tensors((1, "weight"), (2, "bias"))
    if weight is None or len(weight.shape) != 2 or (bias and bias.shape != weight.shape[:1]):
        raise Unpackable("its weight and bias are not [O, I] and [O]")
    return LinearFunction()


_PRODUCTS = (torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm")

rule(*_PRODUCTS, pure=True)(to_batch)


@batch_rule(*_PRODUCTS, pure=True, first=True)
def run_product(call: Call) -> Direct | BroadcastInBatch:
    """Products of every image's matrices, with each other or with a matrix of each branch."""
    result = call.result_facts()
    if len(call.node.args) != 2:
        raise Unpackable("an operand is given by keyword")
    assert result.batch_dim is not None
    if result.batch_dim > len(result.shape) - 3:
        raise Unpackable("the batch is a dim of its matrices")
    operands = [call.tensor(argument) for argument in call.node.args]
    require_aligned(operands, result)
    return run_with_parameters(call, torch.matmul, operands, result)


@batch_rule(torch.einsum, first=True)
def run_einsum(call: Call) -> Direct | EinsumOfBranches:
    """Products whose subscripts keep the batch in one letter."""
    equation, *arguments = call.node.args
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise Unpackable("its equation is not spelled out")
    result = call.result_facts()
    assert result.batch_dim is not None
    left, target = equation.replace(" ", "").split("->")
    sources = left.split(",")
    dims: list[int | None] = []
    for argument, subscripts in zip(arguments, sources, strict=True):
        operand = call.tensor(argument)
        if operand is None:
            raise Unpackable("an operand is not a single tensor")
        if operand.batch_dim is None:
            dims.append(None if argument in call.varying else -1)
        elif subscripts[operand.batch_dim] != target[result.batch_dim]:
            raise Unpackable("its operands hold the batch in different dims")
        else:
            dims.append(operand.batch_dim)
    if None not in dims:
        return Direct(call.target)
    return EinsumOfBranches(sources, target, dims, result.batch_dim)
