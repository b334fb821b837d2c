"""Windows of every image, as timm's functions that tracing leaves whole cut and join them."""

from typing import Any

import timm.models  # noqa: F401 - registers those functions
from timm.layers import _fx as timm_registry

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.direct import Direct
from treeify.rules.table import batch_rule
from treeify.tracing.facts import TensorFacts
from treeify.tracing.replacements import OF_EACH_IMAGE

_NAMES = {
    *("window_reverse", "window_reverse_nchw", "grid_reverse", "grid_reverse_nchw"),
    "deblockify",
}
_registry: Any = timm_registry  # has no annotations
# Several models have a function of one name.
_JOINING = [
    function for function in _registry.get_notrace_functions() if function.__name__ in _NAMES
]


@batch_rule(*_JOINING, *OF_EACH_IMAGE, pure=True)
def run_windows(call: Call) -> Direct:
    """Windows of every image, cut or put together again."""
    operands, result = call.tensor_arguments(), call.facts.value
    if not isinstance(result, TensorFacts) or any(
        tensor.batch_dim != 0 for tensor in (*operands, result)
    ):
        raise Unpackable("its input does not begin with the batch")
    return Direct(call.target)
