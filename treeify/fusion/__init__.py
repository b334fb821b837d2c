"""Operations for evaluation without gradients: layers with what follows them fused in.

Weights are folded and reordered for the processor when first used, and again whenever a tensor they
come from has changed. A sum or an activation that alone reads a new tensor may overwrite it, since
no gradient will ask for it.
"""

from treeify.fusion.conv import CONVOLUTIONS, FusedConv, packed_module
from treeify.fusion.linear import FusedLinear
from treeify.fusion.overwrite import Activation, AddInto, Overwrite
from treeify.fusion.prepared_weights import Prepared

__all__ = [
    "CONVOLUTIONS",
    "Activation",
    "AddInto",
    "FusedConv",
    "FusedLinear",
    "Overwrite",
    "Prepared",
    "packed_module",
]
