"""Rules: how operations run on packed branches, one family per file. Importing registers all."""

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
from treeify.rules.registry import (
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
