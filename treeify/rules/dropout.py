"""Random operations: every branch draws its own noise, as the separate networks would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import Direct
from treeify.rules.operations.widened import Widened, widened
from treeify.rules.table import batch_rule, rule, widens
from treeify.tree import Span

_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ELEMENT_OR_CHANNEL = (nn.Dropout, nn.AlphaDropout, *_CHANNEL)
_SAMPLE = (DropPath, StochasticDepth)
# All of them give back their input in evaluation mode.
DROPOUTS = (*_ELEMENT_OR_CHANNEL, *_SAMPLE)


@widens(*DROPOUTS)
def pack_dropout(dropout: nn.Module, branches: int) -> None:
    """Dropout is the same for any number of channels."""


@rule(*_ELEMENT_OR_CHANNEL)
def pack_dropout_module(call: Call) -> Widened:
    """A mask over packed elements or channels is a mask of its own for every branch."""
    if isinstance(call.module, _CHANNEL):
        call.input_facts()
        call.require_rank()
    return widened(call)


_CHANNEL_FUNCTIONS = (F.dropout1d, F.dropout2d, F.dropout3d)
_FUNCTIONS = (F.dropout, F.alpha_dropout, torch.dropout, *_CHANNEL_FUNCTIONS)


@rule(*_FUNCTIONS)
def pack_dropout_function(call: Call) -> Direct:
    """The same as functions."""
    call.input_facts()
    if call.node.target in _CHANNEL_FUNCTIONS:
        call.require_rank()
    return Direct(call.node.target)


class PackedStochasticDepth(nn.Module):
    """Drops whole residual branches per image and tree branch."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, ...] -> [N, G*C, ...]`."""
        if not self.drop.training:
            return x
        return torch.cat([self.drop(piece) for piece in x.chunk(span.size, dim=1)], dim=1)


@rule(*_SAMPLE)
def pack_stochastic_depth(call: Call) -> PackedStochasticDepth:
    """Stochastic depth."""
    call.input_facts()
    return PackedStochasticDepth(call.packed_module)


@batch_rule(*DROPOUTS)
def run_dropout_module(call: Call) -> Direct:
    """In the batch every image of every branch draws its own mask."""
    known = call.batch_facts()
    if known.batch_dim != 0 or getattr(call.module, "mode", "row") != "row":
        raise Unpackable("it draws one mask for the whole batch")
    return Direct(call.packed_module)


@batch_rule(*_FUNCTIONS)
def run_dropout_function(call: Call) -> Direct:
    """The same as functions."""
    if call.require_one_tensor().batch_dim != 0:
        raise Unpackable("its input does not begin with the batch")
    return Direct(call.node.target)
