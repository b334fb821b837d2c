"""Rules: how operations run on packed branches, one family per file. Importing registers all."""

from treeify.rules import conv, dropout, elementwise, linear, norm, pooling, shape
from treeify.rules.registry import WIDEN, Call, Unpackable, find, is_pure, leaf_types, rule, widens

__all__ = [
    "WIDEN",
    "Call",
    "Unpackable",
    "conv",
    "dropout",
    "elementwise",
    "find",
    "is_pure",
    "leaf_types",
    "linear",
    "norm",
    "pooling",
    "rule",
    "shape",
    "widens",
]
