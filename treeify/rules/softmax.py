"""Softmax and gated linear units: along any dim but the batch."""

import torch
import torch.nn.functional as F
from torch import nn

from treeify.rules.image_by_image import run_along, to_batch, to_batch_along
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged

_SOFTMAX = (torch.softmax, F.softmax, F.log_softmax, "softmax", "log_softmax")
_MODULES = (nn.Softmax, nn.GLU)

widens(*_MODULES, nn.LogSoftmax)(unchanged)
rule(*_SOFTMAX, *_MODULES, pure=True)(to_batch_along(1))
batch_rule(*_SOFTMAX, torch.log_softmax, *_MODULES, nn.LogSoftmax, pure=True)(run_along(1))
rule(F.glu, pure=True)(to_batch)
