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
from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import Direct
from treeify.rules.table import batch_rule, leaf_types, rule, rules_of, widen_rules, widens

__all__ = [
    "Call",
    "Direct",
    "Unpackable",
    "attention",
    "batch_rule",
    "conv",
    "dropout",
    "elementwise",
    "in_batch",
    "leaf_types",
    "linear",
    "norm",
    "pooling",
    "rule",
    "rules_of",
    "shape",
    "widen_rules",
    "widens",
]
