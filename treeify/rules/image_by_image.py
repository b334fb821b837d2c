"""Operations that treat every image by itself: more images in the batch are all the same to them.

What is left to decide is whether a call leaves the batch alone: its dims tell.
"""

from collections.abc import Callable

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.direct import Direct, ToBatch

_ALONG_BATCH = "it works along the batch"
_NO_CONSTANT = "its dim is not a constant"


def dims_of(call: Call, rank: int, position: int, default: int | None = None) -> tuple[int, ...]:
    """The dims that a call works along, counted from the front; none where they are no constants.

    Args:
        call: of a function or method with an argument for dims, or of a module with a `dim`.
        rank: of the tensor that has the dims.
        position: of the argument.
        default: the dim where no argument says otherwise.
    """
    node = call.node
    if call.module is not None:
        dims = call.module.dim
    elif node.target == "flip" and len(node.args) > 2:  # flip(1, 2) as well as flip((1, 2))
        dims = node.args[1:]
    else:
        by_name = (node.kwargs[name] for name in ("dim", "dims", "axis") if name in node.kwargs)
        dims = next(by_name, call.argument(position, "dim", default))
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    return tuple(dim % rank for dim in dims) if all(isinstance(dim, int) for dim in dims) else ()


def to_batch(call: Call) -> ToBatch:
    """The packed operation of what treats every image by itself; Unpackable without a batch."""
    call.require_channels()
    return ToBatch(call.target)


def to_batch_along(position: int, default: int | None = None) -> Callable[[Call], ToBatch]:
    """The packed rule of what keeps the shape and works along dims, found as `dims_of` does."""

    def pack_along(call: Call) -> ToBatch:
        operation = to_batch(call)
        # The shape of the result does not tell here: along the batch it would be the same.
        dims = dims_of(call, len(call.input_facts().shape), position, default)
        if not dims or 0 in dims:
            raise Unpackable(_ALONG_BATCH if dims else _NO_CONSTANT)
        return operation

    return pack_along


def run_along(
    position: int, default: int | None = None, *, batch_too: bool = False
) -> Callable[[Call], Direct]:
    """The batch rule of what works along dims, found as `dims_of` does.

    With `batch_too` it may work along the batch as well.
    """

    def run_along_dims(call: Call) -> Direct:
        operands = call.tensor_arguments() or [call.batch_facts()]
        batch_dims = {operand.batch_dim for operand in operands}
        if None in batch_dims:
            raise Unpackable("an operand has no batch dim")
        dims = dims_of(call, len(operands[0].shape), position, default)
        if not dims or (operands[0].batch_dim in dims and not batch_too):
            raise Unpackable(_ALONG_BATCH if dims else _NO_CONSTANT)
        if len(batch_dims) > 1:
            raise Unpackable("its operands hold the batch in different dims")
        return Direct(call.target)

    return run_along_dims
