"""Random operations: every branch draws its own noise, as the separate networks would."""

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.packed import PackedStochasticDepth
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged, widened

_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ELEMENT_OR_CHANNEL = (nn.Dropout, nn.AlphaDropout, *_CHANNEL)
_STOCHASTIC_DEPTH = (DropPath, StochasticDepth)
# All of them give back their input in evaluation mode.
DROPOUTS = (*_ELEMENT_OR_CHANNEL, *_STOCHASTIC_DEPTH)
_CHANNEL_FUNCTIONS = (F.dropout1d, F.dropout2d, F.dropout3d)
_FUNCTIONS = (F.dropout, F.alpha_dropout, torch.dropout, *_CHANNEL_FUNCTIONS)


widens(*DROPOUTS)(unchanged)


@rule(*_ELEMENT_OR_CHANNEL, *_FUNCTIONS)
def pack_dropout(call: Call) -> nn.Module:
    """A mask over packed elements or channels is a mask of its own for every branch."""
    call.input_facts()
    if call.kind in (*_CHANNEL, *_CHANNEL_FUNCTIONS):
        call.require_rank()
    return Direct(call.target) if call.module is None else widened(call)


@batch_rule(*DROPOUTS, *_FUNCTIONS)
def run_dropout(call: Call) -> Direct:
    """In the batch every image of every branch draws its own mask."""
    if call.module is None:
        call.require_one_tensor()
    call.batch_first_facts()
    if getattr(call.module, "mode", "row") != "row":
        raise Unpackable("it draws one mask for the whole batch")
    return Direct(call.target)


@rule(*_STOCHASTIC_DEPTH)
def pack_stochastic_depth(call: Call) -> PackedStochasticDepth:
    """Stochastic depth, drawn for each branch by itself."""
    call.input_facts()
    return PackedStochasticDepth(call.packed_module)
