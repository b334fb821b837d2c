"""Transposing, flipping, rolling and shuffling: elements change places, images do not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from treeify.rules.call import Call
from treeify.rules.image_by_image import run_along, to_batch, to_batch_along
from treeify.rules.operations.direct import Direct, call_target
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged
from treeify.tracing.facts import TensorFacts

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


rule(*_TRANSPOSES, pure=True)(to_batch)


@batch_rule(*_TRANSPOSES, "t", pure=True, first=_puts_channels_last)
def run_transpose(call: Call) -> Direct:
    """Dims change places, the batch as one of them."""
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
