"""Branches in the batch: what treats every image by itself runs as it stands on `G*N` images.

Each rule refuses calls that work along the batch. Which dim holds the batch is known of every value
(`TensorFacts.batch_dim`); the images of one branch always come before those of the next.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import timm.models  # noqa: F401 - registers the functions that tracing keeps whole
import torch
import torch.nn.functional as F
from timm.layers import _fx as timm_registry
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import Direct, call_target, require_aligned
from treeify.rules.shape import SHAPE_READINGS, Item
from treeify.rules.table import batch_rule, widens
from treeify.tracing.facts import TensorFacts, facts
from treeify.tracing.functionalize import set_item
from treeify.tracing.replacements import OF_EACH_IMAGE
from treeify.tree import Span

_ALONG_BATCH = "it works along the batch"
_REPEATS = (torch.repeat_interleave, "repeat_interleave")

# Where these take the dims they work along; `None` where they would take all of them.
_DIMS: dict[Any, int] = {
    **dict.fromkeys((torch.softmax, torch.log_softmax, F.softmax, F.log_softmax), 1),
    **dict.fromkeys(("softmax", "log_softmax", torch.logsumexp, "logsumexp"), 1),
    **dict.fromkeys((torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min), 1),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", torch.prod, "prod"), 1),
    **dict.fromkeys((torch.std, torch.var, "std", "var", torch.argmax, "argmax"), 1),
    **dict.fromkeys((torch.cumsum, "cumsum", torch.unbind, "unbind", torch.flip, "flip"), 1),
    **dict.fromkeys((torch.squeeze, "squeeze", torch.select, "select", "unfold"), 1),
    **dict.fromkeys((torch.index_select, "index_select", torch.narrow, "narrow"), 1),
    **dict.fromkeys((torch.norm, "norm", F.normalize, torch.roll, "roll", torch.topk, "topk"), 2),
    **dict.fromkeys((torch.chunk, "chunk", torch.split, "split", torch.tensor_split), 2),
    **dict.fromkeys(_REPEATS, 2),
    **dict.fromkeys((torch.cat, torch.concat), 1),
    torch.linalg.norm: 2,
    torch.linalg.vector_norm: 2,
}
_DEFAULT_DIM: dict[Any, int] = {
    **dict.fromkeys((F.normalize,), 1),
    **dict.fromkeys((torch.chunk, "chunk", torch.split, "split", torch.unbind, "unbind"), 0),
    **dict.fromkeys((torch.cat, torch.concat, torch.tensor_split), 0),
    **dict.fromkeys((torch.topk, "topk"), -1),
}


def _constant_dims(given: Any, rank: int) -> tuple[int, ...]:
    """Dims as non-negative numbers.

    Raises:
        Unpackable: they are not given, or not as constants.
    """
    dims = given if isinstance(given, list | tuple) else (given,)
    if not dims or not all(isinstance(dim, int) for dim in dims):
        raise Unpackable("its dim is not a constant")
    return tuple(dim % rank for dim in dims)


@batch_rule(*(own for own in _DIMS if own not in _REPEATS), pure=True)
@batch_rule(*_REPEATS, pure=True, counts=True)
def run_along_dims(call: Call) -> Direct:
    """Reductions, softmax, cuts and joins along dims other than the batch."""
    target: Any = call.node.target
    tensors = call.tensor_arguments()
    known = tensors[0] if tensors else call.batch_facts()
    if any(fact.batch_dim is None for fact in tensors[: 1 if target in _TAKES_INDEX else None]):
        raise Unpackable("an operand has no batch dim")
    if target in _TAKES_INDEX and call.argument(2, "index") in call.varying:
        raise Unpackable("each branch has an index of its own")
    given = _given_dims(call)
    if known.batch_dim in _constant_dims(given, len(known.shape)) and not _repeats_each(call):
        raise Unpackable(_ALONG_BATCH)
    if any(fact.batch_dim != known.batch_dim for fact in tensors if fact.batch_dim is not None):
        raise Unpackable("its operands hold the batch in different dims")
    return Direct(target)


def _repeats_each(call: Call) -> bool:
    """Whether it puts every image's copies beside it, as many of each."""
    repeats = call.argument(1, "repeats")
    number = isinstance(repeats, int) or (
        isinstance(repeats, fx.Node) and not facts(repeats).tensors
    )
    return call.node.target in _REPEATS and number


_TAKES_INDEX = (torch.index_select, "index_select")


def _given_dims(call: Call) -> Any:
    target: Any = call.node.target
    position = _DIMS[target]
    for name in ("dim", "dims", "axis"):
        if name in call.node.kwargs:
            return call.node.kwargs[name]
    if target == "flip":  # flip(1, 2) as well as flip((1, 2))
        given: Any = call.node.args[1:]
        return given[0] if len(given) == 1 else given
    return call.argument(position, "dim", _DEFAULT_DIM.get(target))


_REARRANGEMENTS = (
    *("permute", "transpose", "swapaxes", "movedim", "t"),
    *(torch.permute, torch.transpose, torch.swapaxes, torch.movedim),
)


def _puts_channels_last(call: Call) -> bool:
    """Whether channels become features: linear layers and norms will follow."""
    node: Any = call.node
    before, after = call.tensor(call.argument(0, "input")), call.facts.value
    if before is None or not isinstance(after, TensorFacts):
        return False
    if not before.batched or not after.batched or len(before.shape) not in (3, 4):
        return False
    given = (node.args[1:], {key: own for key, own in node.kwargs.items() if key != "input"})
    if any(isinstance(own, fx.Node) for own in tree_leaves(given)):
        return False  # dims that are computed
    whole = torch.empty(before.shape, device="meta")
    moved = call_target(node.target, whole, *given[0], **given[1])
    return bool(moved.stride(-1) == whole.stride(1))


@batch_rule(*_REARRANGEMENTS, pure=True, first=_puts_channels_last)
def run_rearrangement(call: Call) -> Direct:
    """Dims change places, the batch as one of them."""
    call.require_one_tensor()
    return Direct(call.node.target)


batch_rule(torch.unsqueeze, "unsqueeze", pure=True)(run_rearrangement)


def _kept_whole(name: str) -> list[Any]:
    """Functions of timm's models that tracing does not open, by their name."""
    registry: Any = timm_registry  # has no annotations
    return [own for own in registry.get_notrace_functions() if own.__name__ == name]


_WINDOWS = ("window_reverse", "window_reverse_nchw", "grid_reverse", "grid_reverse_nchw")


@batch_rule(*(own for name in (*_WINDOWS, "deblockify") for own in _kept_whole(name)), pure=True)
@batch_rule(*OF_EACH_IMAGE, pure=True)
def run_windows(call: Call) -> Direct:
    """Windows of every image, cut or put together again."""
    found, after = call.tensor_arguments(), call.facts.value
    if not isinstance(after, TensorFacts) or any(own.batch_dim != 0 for own in (*found, after)):
        raise Unpackable("its input does not begin with the batch")
    return Direct(call.node.target)


@batch_rule(torch.stack, pure=True)
def run_stack(call: Call) -> Direct:
    """A new dim beside the batch."""
    found = call.tensor_arguments()
    if len({fact.batch_dim for fact in found}) != 1 or found[0].batch_dim is None:
        raise Unpackable("its operands hold the batch in different dims")
    return Direct(call.node.target)


_RESHAPES = ("view", "reshape", torch.reshape, "unflatten", torch.unflatten)


@batch_rule(*_RESHAPES, pure=True, counts=True)
def run_reshape(call: Call) -> Direct:
    """Reshapes that leave the order of the images alone."""
    known = call.require_one_tensor()
    if any(isinstance(arg, torch.dtype) for arg in call.node.args[1:]):
        raise Unpackable("it is given no plain shape")
    _require_kept_order(known, call.facts.value)
    return Direct(call.node.target)


batch_rule("flatten", torch.flatten, pure=True)(run_reshape)


@batch_rule("reshape_as", "view_as", pure=True)
def run_reshape_as(call: Call) -> Direct:
    """The same with the shape of another tensor."""
    known = call.batch_facts()
    if any(fact.batch_dim is None for fact in call.tensor_arguments()):
        raise Unpackable("an operand has no batch dim")
    _require_kept_order(known, call.facts.value)
    return Direct(call.node.target)


def _require_kept_order(before: TensorFacts, after: Any) -> None:
    """Refuse a reshape after which images are no longer the slowest part of their dim."""
    assert before.batch_dim is not None
    kept = (
        isinstance(after, TensorFacts)
        and after.batch_dim is not None
        and prod(before.shape[: before.batch_dim]) == prod(after.shape[: after.batch_dim])
    )
    if not kept:
        raise Unpackable("it mixes the batch with other dims")


class ExpandEach(nn.Module):
    """Expands a tensor without a batch, one per branch, to every image of the branch.

    Args:
        target: the expanding method.
        dim: where the result has its batch; 1 long in the tensor.
    """

    def __init__(self, target: Any, dim: int) -> None:
        super().__init__()
        self.target, self.dim = target, dim

    def forward(self, span: Span, stacked: Tensor, *sizes: Any) -> Tensor:
        """`[G, 1, ...] -> [G*N, ...]`."""
        whole = stacked.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        given = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
        images = given[self.dim] // span.size
        given[self.dim] = -1 if self.target == "expand" else 1
        rest: Tensor = call_target(self.target, whole, *given)
        return rest.repeat_interleave(images, self.dim)


@batch_rule("expand", "expand_as", "repeat", pure=True, counts=True)
def run_expand(call: Call) -> nn.Module:
    """Tokens and masks expanded to the batch."""
    target: Any = call.node.target
    first = call.tensor(call.argument(0, "input"))
    result = call.facts.value
    if first is None or not isinstance(result, TensorFacts) or result.batch_dim is None:
        raise Unpackable("its result has no batch dim")
    from_right = len(result.shape) - result.batch_dim
    own = len(first.shape) - from_right
    if first.batch_dim is not None:
        kept = own == first.batch_dim and first.shape[own] == result.shape[result.batch_dim]
        if not kept:
            raise Unpackable("it repeats the batch")
        return Direct(target)
    if call.argument(0, "input") not in call.varying:
        return Direct(target)
    exact = result.counts_images and len(first.shape) == len(result.shape) and first.shape[own] == 1
    if target == "expand_as" or call.node.kwargs or not exact:
        raise Unpackable("it expands a parameter in another way than to every image")
    return ExpandEach(target, own)


@batch_rule(operator.getitem, pure=True)
def run_getitem(call: Call) -> nn.Module:
    """Elements of what another operation returned, and slices that leave the batch alone."""
    source, index = call.node.args
    assert isinstance(source, fx.Node)
    known = call.tensor(source)
    if known is None:
        return Item()
    if known.batch_dim is None:
        raise Unpackable("its input has no batch dim")
    items = list(index) if isinstance(index, tuple) else [index]
    nodes = [item for item in items if isinstance(item, fx.Node)]
    if any(item in call.varying and facts(item).tensors for item in nodes):
        raise Unpackable("its index differs from branch to branch")
    if _indices(items, len(known.shape))[known.batch_dim] != slice(None):
        raise Unpackable("it indexes the batch")
    return Direct(operator.getitem)


@batch_rule(set_item)
def run_set_item(call: Call) -> Direct:
    """Parts of every image replaced."""
    _, index, item = call.node.args
    known = call.batch_facts()
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(own is Ellipsis or type(own) in (int, slice) for own in items):
        raise Unpackable("it is told where by more than numbers and slices")
    by_dim = _indices(items, len(known.shape))
    assert known.batch_dim is not None
    if by_dim[known.batch_dim] != slice(None):
        raise Unpackable("it sets some images")
    replacement = call.tensor(item)
    if replacement is not None and replacement.batch_dim is None and item in call.varying:
        raise Unpackable("it sets one value a branch")
    kept = [dim for dim, own in enumerate(by_dim) if type(own) is slice]
    shape, at = tuple(known.shape[dim] for dim in kept), kept.index(known.batch_dim)
    require_aligned([replacement], TensorFacts(shape, at == 0, at))
    return Direct(set_item)


def _indices(items: Sequence[Any], rank: int) -> list[Any]:
    """What each dim of the indexed tensor is indexed with."""
    used = sum(_dims_taken(item) for item in items)
    found: list[Any] = []
    for item in items:
        if item is Ellipsis:
            found += [slice(None)] * (rank - used)
        else:
            found += [item] * _dims_taken(item)
    return found + [slice(None)] * (rank - len(found))


def _dims_taken(item: Any) -> int:
    return 0 if item is None or item is Ellipsis else 1


class ShapeInBatch(nn.Module):
    """What the base model would read of a tensor's shape: `N`, not `G*N`.

    Args:
        target: the function or method that reads it.
        dim: the tensor's batch dim.
    """

    def __init__(self, target: Any, dim: int) -> None:
        super().__init__()
        self.target, self.dim = target, dim

    def forward(self, span: Span, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The target applied to one branch's images."""
        images = x.shape[self.dim] // span.size
        return call_target(self.target, x.narrow(self.dim, 0, images), *args, **kwargs)


@batch_rule(*SHAPE_READINGS, pure=True)
def run_shape_reading(call: Call) -> nn.Module:
    """Reading a size, rank or dtype: the same for all branches."""
    known = call.batch_facts()
    if call.facts.tensors:
        return _attribute(call)
    assert known.batch_dim is not None
    return ShapeInBatch(call.node.target, known.batch_dim)


def _attribute(call: Call) -> Direct:
    if call.argument(1, "name") not in ("T", "mT", "data"):
        raise Unpackable("it reads a tensor attribute")
    return Direct(call.node.target)


@widens(nn.LogSoftmax, nn.Unflatten)
def pack_storage(module: nn.Module, branches: int) -> None:
    """Nothing in the module depends on the number of channels."""


@batch_rule(nn.Softmax, nn.LogSoftmax, nn.GLU, pure=True)
def run_module_along_dim(call: Call) -> Direct:
    """Modules that work along one dim."""
    known = call.batch_facts()
    module: Any = call.module
    if known.batch_dim in _constant_dims(module.dim, len(known.shape)):
        raise Unpackable(_ALONG_BATCH)
    return Direct(call.packed_module)


@batch_rule(nn.Flatten, nn.Unflatten, pure=True)
def run_reshape_module(call: Call) -> Direct:
    """Modules that reshape."""
    _require_kept_order(call.batch_facts(), call.facts.value)
    return Direct(call.packed_module)
