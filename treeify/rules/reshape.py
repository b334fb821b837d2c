"""Reshapes that leave the order of the images alone."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.image_by_image import run_along, to_batch, to_batch_along
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.shapes import Reshape
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged, widened
from treeify.tracing.facts import TensorFacts

_RESHAPES = ("view", "reshape", torch.reshape)


@rule(*_RESHAPES, pure=True)
def pack_reshape(call: Call) -> Reshape:
    """Reshapes that keep dim 0."""
    call.input_facts()
    call.require_channels()
    _require_plain_shape(call)
    if call.node.kwargs or any(call.tensor(size) for size in call.node.args[1:]):
        raise Unpackable("its shape is not a list of sizes")
    return Reshape()


@batch_rule(*_RESHAPES, "unflatten", torch.unflatten, pure=True, counts=True)
@batch_rule("flatten", torch.flatten, pure=True)
def run_reshape(call: Call) -> Direct:
    """Reshapes of every image, or of all the images' rows."""
    operand = call.require_one_tensor()
    _require_plain_shape(call)
    _require_image_order(operand, call.facts.value)
    return Direct(call.target)


def _require_plain_shape(call: Call) -> None:
    """Refuse `x.view(torch.int32)`, which reads the same memory as another type."""
    if any(isinstance(argument, torch.dtype) for argument in call.node.args[1:]):
        raise Unpackable("its shape is not a list of sizes")


@batch_rule("reshape_as", "view_as", pure=True)
def run_reshape_as(call: Call) -> Direct:
    """Reshapes to the shape of another tensor."""
    operand = call.batch_facts()
    if any(argument.batch_dim is None for argument in call.tensor_arguments()):
        raise Unpackable("an operand has no batch dim")
    _require_image_order(operand, call.facts.value)
    return Direct(call.target)


def _require_image_order(before: TensorFacts, after: Any) -> None:
    """Refuse a reshape after which images are no longer the slowest part of their dim.

    With as many elements before the batch dim as there were, the images of one branch still come
    before those of the next.

    Raises:
        Unpackable: it is such a reshape.
    """
    assert before.batch_dim is not None
    if (
        not isinstance(after, TensorFacts)
        or after.batch_dim is None
        or prod(before.shape[: before.batch_dim]) != prod(after.shape[: after.batch_dim])
    ):
        raise Unpackable("it mixes the batch with other dims")


widens(nn.Flatten, nn.Unflatten)(unchanged)


@rule(nn.Flatten, "flatten", torch.flatten, pure=True)
def pack_flatten(call: Call) -> nn.Module:
    """Flattening from dim 1 or later is branch-major already."""
    call.require_channels()
    flatten = call.module
    start = call.argument(1, "start_dim", 0) if flatten is None else flatten.start_dim
    if not isinstance(start, int) or start % len(call.input_facts().shape) == 0:
        raise Unpackable("it flattens the batch")
    return Direct(call.target) if flatten is None else widened(call)


@batch_rule(nn.Flatten, nn.Unflatten, pure=True)
def run_reshape_module(call: Call) -> Direct:
    """Modules that reshape every image."""
    _require_image_order(call.batch_facts(), call.facts.value)
    return Direct(call.target)


rule(torch.squeeze, "squeeze", pure=True)(to_batch_along(1))
batch_rule(torch.squeeze, "squeeze", pure=True)(run_along(1))
rule(torch.unsqueeze, "unsqueeze", pure=True)(to_batch)


@batch_rule(torch.unsqueeze, "unsqueeze", pure=True)
def run_unsqueeze(call: Call) -> Direct:
    """A new dim, before the batch or after it."""
    call.require_one_tensor()
    return Direct(call.target)
