"""A call of the base graph comes in; out goes the module that runs it on all branches, or why none.

Rules are registered in one table, one family of operations per file; importing registers all.
"""

from treeify.rules import (  # noqa: F401 - each registers its rules
    attention,
    conv,
    dropout,
    elementwise,
    indexing,
    linear,
    norm,
    pooling,
    reductions,
    shapes,
    softmax,
    windows,
)
from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.direct import Direct
from treeify.rules.table import batch_rule, leaf_types, rule, rules_of, widen_rules, widens

__all__ = [
    "Call",
    "Direct",
    "Unpackable",
    "batch_rule",
    "leaf_types",
    "rule",
    "rules_of",
    "widen_rules",
    "widens",
]
