"""Shapes: read, reshaped, expanded, transposed or shuffled, while images keep their order."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from treeify.rules.call import Call, Unpackable
from treeify.rules.image_by_image import run_along, to_batch, to_batch_along
from treeify.rules.operations.direct import Direct, call_target
from treeify.rules.operations.shapes import BranchShape, ExpandEach, Reshape
from treeify.rules.table import batch_rule, pure, rule, widens
from treeify.rules.widening import unchanged, widened
from treeify.tracing.facts import TensorFacts, facts

SHAPE_READINGS: tuple[Any, ...] = (
    *("size", "dim", "numel", "ndimension", "is_floating_point", getattr),
)
_NO_READING = "it reads a tensor attribute"


@rule(*SHAPE_READINGS, pure=True)
def pack_shape_reading(call: Call) -> BranchShape:
    """Readings of packed tensors."""
    call.input_facts()
    if call.facts.tensors:
        raise Unpackable(_NO_READING)
    return BranchShape(call.target, 1)


@batch_rule(*SHAPE_READINGS, pure=True)
def run_shape_reading(call: Call) -> nn.Module:
    """Readings of tensors in the batch; `x.T` and `x.data` are tensors themselves."""
    operand = call.batch_facts()
    if not call.facts.tensors:
        assert operand.batch_dim is not None
        return BranchShape(call.target, operand.batch_dim)
    if call.argument(1, "name") not in ("T", "mT", "data"):
        raise Unpackable(_NO_READING)
    return Direct(call.target)


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


_TRANSPOSES = (
    *("permute", "transpose", "swapaxes", "movedim"),
    *(torch.permute, torch.transpose, torch.swapaxes, torch.movedim),
)
_SHUFFLES = (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_SHUFFLE_FUNCTIONS = (F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle)


def _puts_channels_last(call: Call) -> bool:
    """Whether channels become features: linear layers and norms will follow.

    These run in the batch, and going there with the transpose costs one copy instead of two.
    """
    node: Any = call.node
    before, after = call.tensor(call.argument(0, "input")), call.facts.value
    if before is None or not isinstance(after, TensorFacts):
        return False
    if not before.batched or not after.batched or len(before.shape) not in (3, 4):
        return False
    options = {key: value for key, value in node.kwargs.items() if key != "input"}
    if any(isinstance(leaf, fx.Node) for leaf in tree_leaves((node.args[1:], options))):
        return False  # dims that are computed
    image = torch.empty(before.shape, device="meta")
    moved = call_target(node.target, image, *node.args[1:], **options)
    return bool(moved.stride(-1) == image.stride(1))


rule(*_TRANSPOSES, torch.unsqueeze, "unsqueeze", pure=True)(to_batch)


@batch_rule(*_TRANSPOSES, "t", pure=True, first=_puts_channels_last)
@batch_rule(torch.unsqueeze, "unsqueeze", pure=True)
def run_transpose(call: Call) -> Direct:
    """Dims change places, the batch as one of them, or a new one comes before or after it."""
    call.require_one_tensor()
    return Direct(call.target)


rule(torch.flip, "flip", pure=True)(to_batch_along(1))
batch_rule(torch.flip, "flip", pure=True)(run_along(1))
rule(torch.roll, "roll", pure=True)(to_batch_along(2))
batch_rule(torch.roll, "roll", pure=True)(run_along(2))

widens(*_SHUFFLES)(unchanged)
rule(*_SHUFFLES, *_SHUFFLE_FUNCTIONS, pure=True)(to_batch)


@batch_rule(*_SHUFFLES, *_SHUFFLE_FUNCTIONS, pure=True)
def run_shuffle(call: Call) -> Direct:
    """Shuffles of every image's channels, in the batch."""
    call.require_one_tensor()
    call.require_rank()
    return Direct(call.target)
