"""Copies of tensors: parameters for every image, and every image several times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.image_by_image import run_along
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.shapes import ExpandEach
from treeify.rules.table import batch_rule, pure
from treeify.tracing.facts import facts


@batch_rule("expand", "expand_as", "repeat", pure=True, counts=True)
def run_expand(call: Call) -> nn.Module:
    """Tokens and masks expanded to the batch."""
    argument = call.argument(0, "input")
    operand, result = call.tensor(argument), call.result_facts()
    if operand is None:
        raise Unpackable("its result has no batch dim")
    assert result.batch_dim is not None
    # Dims are aligned from the right: where the operand has what is the batch of the result.
    dim = len(operand.shape) - len(result.shape) + result.batch_dim
    if operand.batch_dim is not None:
        same_dim = dim == operand.batch_dim
        if not same_dim or operand.shape[dim] != result.shape[result.batch_dim]:
            raise Unpackable("it repeats the batch")
        return Direct(call.target)
    if argument not in call.varying:
        return Direct(call.target)
    to_each_image = result.counts_images and len(operand.shape) == len(result.shape)
    if (
        call.target == "expand_as"
        or call.node.kwargs
        or not (to_each_image and operand.shape[dim] == 1)
    ):
        raise Unpackable("it expands a parameter in another way than to every image")
    return ExpandEach(call.target, dim)


@batch_rule(torch.repeat_interleave, "repeat_interleave", pure=True, counts=True)
def run_repeat_interleave(call: Call) -> Direct:
    """Every element several times; also every image, where each has as many copies."""
    repeats = call.argument(1, "repeats")
    is_number = isinstance(repeats, int) or (
        isinstance(repeats, fx.Node) and not facts(repeats).tensors
    )
    return run_along(2, batch_too=is_number)(call)


# What makes tensors without images: siblings may share the result.
pure(torch.arange, torch.zeros, torch.ones, torch.full, torch.linspace, torch.meshgrid)
pure("new_zeros", "new_ones", "new_full", torch.zeros_like, torch.ones_like, F.one_hot)
