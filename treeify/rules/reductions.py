"""Sums, means, extremes and norms of tensors, along any dim but the batch."""

import torch
import torch.nn.functional as F

from treeify.rules.call import Call
from treeify.rules.image_by_image import dims_of, run_along, to_batch, to_batch_along
from treeify.rules.operations.direct import Direct, ToBatch
from treeify.rules.table import batch_rule, rule

_SPATIAL = (torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin")
_REDUCTIONS = (
    *(torch.max, torch.min, torch.std, torch.var, torch.logsumexp),
    *("max", "min", "std", "var", "logsumexp"),
)
_NORMS = (torch.norm, "norm")


@rule(*_SPATIAL, pure=True)
def pack_spatial_reduction(call: Call) -> Direct | ToBatch:
    """Reductions; over height and width they run on packed channels as they stand."""
    operation = to_batch(call)
    dims = dims_of(call, len(call.input_facts().shape), 1)
    return Direct(call.target) if dims and min(dims) >= 2 else operation


rule(*_REDUCTIONS, *_NORMS, pure=True)(to_batch)
rule(F.normalize, pure=True)(to_batch_along(2, default=1))

batch_rule(*_SPATIAL, *_REDUCTIONS, pure=True)(run_along(1))
batch_rule(torch.prod, "prod", torch.argmax, "argmax", pure=True)(run_along(1))
batch_rule(torch.cumsum, "cumsum", pure=True)(run_along(1))
# These are given their order or their count first.
batch_rule(*_NORMS, torch.linalg.norm, torch.linalg.vector_norm, pure=True)(run_along(2))
batch_rule(torch.topk, "topk", pure=True)(run_along(2, default=-1))
batch_rule(F.normalize, pure=True)(run_along(2, default=1))
