"""A call of the base graph comes in; out goes the module that runs it on all branches, or why none.

Rules are registered in one table, one family of operations per file; importing registers all.
"""

from treeify.rules import (
    attention,
    conv,
    dropout,
    elementwise,
    in_batch,
    linear,
    norm,
    pooling,
    shape,
)
from treeify.rules.elementwise import Direct
from treeify.rules.table import (
    WIDEN,
    Call,
    Unpackable,
    batch_rule,
    find,
    is_pure,
    leaf_types,
    rule,
    widens,
)

__all__ = [
    "WIDEN",
    "Call",
    "Direct",
    "Unpackable",
    "attention",
    "batch_rule",
    "conv",
    "dropout",
    "elementwise",
    "find",
    "in_batch",
    "is_pure",
    "leaf_types",
    "linear",
    "norm",
    "pooling",
    "rule",
    "shape",
    "widens",
]
