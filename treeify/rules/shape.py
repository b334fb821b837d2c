"""Operations that read or change shapes, or work across dim 1: they must stay within a branch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import Direct, call_target
from treeify.rules.operations.widened import widened
from treeify.rules.table import pure, rule, widens
from treeify.tree import Span

_FOLDABLE: tuple[Any, ...] = (
    *(torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min, torch.std, torch.var),
    *(torch.softmax, F.softmax, F.log_softmax, torch.logsumexp, torch.norm, F.normalize),
    *(torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.narrow, torch.unbind),
    *(torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.flip, torch.roll),
    *(torch.squeeze, torch.unsqueeze, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
    *(F.glu, torch.matmul, torch.bmm, operator.matmul, F.scaled_dot_product_attention),
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "softmax", "log_softmax"),
    *("logsumexp", "norm", "chunk", "split", "narrow", "unbind", "permute", "transpose"),
    *("swapaxes", "movedim", "flip", "roll", "squeeze", "unsqueeze", "matmul", "bmm"),
)
# Where these take the dims they work along, and which they work along unless told.
_ALONG: dict[Any, tuple[int, int | None]] = {
    **dict.fromkeys((torch.softmax, F.softmax, F.log_softmax, "softmax", "log_softmax"), (1, None)),
    **dict.fromkeys((torch.flip, torch.squeeze, "flip", "squeeze"), (1, None)),
    **dict.fromkeys((torch.roll, "roll"), (2, None)),
    F.normalize: (2, 1),
}
_SPATIAL: tuple[Any, ...] = (torch.mean, torch.sum, torch.amax, torch.amin)
_SPATIAL_METHODS = ("mean", "sum", "amax", "amin")


class ToBatch(nn.Module):
    """Runs an operation with the branches in the batch: `[N*G, C, ...]`.

    Right for anything that treats every image by itself, whatever it does to the other dims.
    """

    def __init__(self, target: Callable[..., Any] | str) -> None:
        super().__init__()
        self.target = target

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The packed result."""
        count = span.size
        in_batch = tree_map(lambda leaf: _to_batch(leaf, count), (args, kwargs))
        result = call_target(self.target, *in_batch[0], **in_batch[1])
        return tree_map(lambda leaf: _from_batch(leaf, count), result)

    def extra_repr(self) -> str:
        """The target, for printing a segment."""
        return getattr(self.target, "__name__", str(self.target))


def _to_batch(leaf: Any, count: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.reshape(leaf.shape[0] * count, leaf.shape[1] // count, *leaf.shape[2:])


def _from_batch(leaf: Any, count: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.reshape(leaf.shape[0] // count, count * leaf.shape[1], *leaf.shape[2:])


def _dims(call: Call, position: int, name: str) -> tuple[int, ...] | None:
    """A call's dim argument as non-negative dims of its first argument; None if it has none."""
    given = call.argument(position, name)
    rank = len(call.input_facts().shape)
    if isinstance(given, int):
        return (given % rank,)
    if isinstance(given, list | tuple) and given and all(isinstance(dim, int) for dim in given):
        return tuple(dim % rank for dim in given)
    return None


@rule(*_FOLDABLE, pure=True)
def pack_in_batch(call: Call) -> nn.Module:
    """Reductions, concatenations, transpositions, products: anything image by image."""
    call.require_channels()
    target: Any = call.node.target
    if target in _ALONG:
        _require_within_image(call, *_ALONG[target])
    if target in _SPATIAL or target in _SPATIAL_METHODS:
        dims = _dims(call, 1, "dim")
        if dims is not None and min(dims) >= 2:
            return Direct(target)
    if target in (torch.cat, torch.concat):
        return _concatenation(call, target)
    return ToBatch(target)


def _require_within_image(call: Call, position: int, default: int | None) -> None:
    """Refuse an operation that keeps the shape but works along the batch."""
    given: Any = call.node.args[position:] or [
        call.node.kwargs[name] for name in ("dim", "dims") if name in call.node.kwargs
    ]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = given[0]
    dims = [default] if not given else list(given)
    rank = len(call.input_facts().shape)
    if not all(isinstance(dim, int) and dim % rank for dim in dims):
        raise Unpackable("it works along the batch, or its dim is not a constant")


class ConcatenateChannels(nn.Module):
    """Concatenation along dim 1 within every branch, in one copy."""

    def forward(self, span: Span, tensors: Any, *_: Any, **__: Any) -> Tensor:
        """`[N, G*C1, ...], [N, G*C2, ...] -> [N, G*(C1 + C2), ...]`."""
        pieces = [tensor.chunk(span.size, dim=1) for tensor in tensors]
        return torch.cat([piece for branch in zip(*pieces, strict=True) for piece in branch], dim=1)


def _concatenation(call: Call, target: Any) -> nn.Module:
    dim = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    rank = len(call.facts.tensors[0].shape)
    if not isinstance(dim, int):
        raise Unpackable("its dim is not a constant")
    return ConcatenateChannels() if dim % rank == 1 else Direct(target)


@widens(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Softmax, nn.GLU)
def pack_rearrangement(module: nn.Module, branches: int) -> None:
    """Nothing in the module depends on the number of channels."""


@rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Softmax, nn.GLU, pure=True)
def pack_module_in_batch(call: Call) -> ToBatch:
    """Modules that work image by image."""
    call.require_channels()
    dim = getattr(call.module, "dim", 1)
    if not isinstance(dim, int) or dim % len(call.input_facts().shape) == 0:
        raise Unpackable("it works along the batch")
    return ToBatch(call.packed_module)


class Reshape(nn.Module):
    """A reshape that keeps the batch: within a branch it becomes one of the packed tensor."""

    def forward(self, span: Span, x: Tensor, *shape: Any) -> Tensor:
        """`[N, G*C, ...] -> [N, G*D, ...]` where the base model makes `[N, D, ...]`."""
        sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
        sizes[0] = x.shape[0]
        if sizes[1] != -1:
            sizes[1] = sizes[1] * span.size  # not in place: while torch traces, sizes are tensors
        return x.reshape(sizes)


@rule("view", "reshape", torch.reshape, pure=True)
def pack_reshape(call: Call) -> Reshape:
    """Reshapes that keep dim 0."""
    call.input_facts()
    call.require_channels()
    if call.node.kwargs or any(
        isinstance(arg, torch.dtype) or call.tensor(arg) for arg in call.node.args[1:]
    ):
        raise Unpackable("it is given no plain shape")
    return Reshape()


@widens(nn.Flatten)
def pack_flatten_storage(flatten: nn.Flatten, branches: int) -> None:
    """Nothing in the module depends on the number of channels."""


@rule(nn.Flatten, pure=True)
def pack_flatten_module(call: Call) -> nn.Module:
    """`nn.Flatten`, which leaves the batch alone unless told otherwise."""
    flatten: Any = call.module
    call.require_channels()
    if flatten.start_dim % len(call.input_facts().shape) == 0:
        raise Unpackable("it flattens the batch")
    return widened(call)


@rule("flatten", torch.flatten, pure=True)
def pack_flatten(call: Call) -> Direct:
    """Flattening from dim 1 or later is branch-major already."""
    call.require_channels()
    start = call.argument(1, "start_dim", 0)
    if not isinstance(start, int) or start % len(call.input_facts().shape) == 0:
        raise Unpackable("it flattens the batch")
    return Direct(call.node.target)


SHAPE_READINGS: tuple[Any, ...] = (
    *("size", "dim", "numel", "ndimension", "is_floating_point", getattr),
)


class BaseShape(nn.Module):
    """What the base model would read of a packed tensor's shape: `C`, not `G*C`.

    Args:
        target: the function or method that reads it.
    """

    def __init__(self, target: Callable[..., Any] | str) -> None:
        super().__init__()
        self.target = target

    def forward(self, span: Span, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The target applied to a branch's view of the tensor."""
        return call_target(self.target, x.narrow(1, 0, x.shape[1] // span.size), *args, **kwargs)


@rule(*SHAPE_READINGS, pure=True)
def pack_shape_reading(call: Call) -> BaseShape:
    """Reading a size, rank or dtype: the same for all branches."""
    call.input_facts()
    if call.facts.tensors:
        raise Unpackable("it reads a tensor attribute")
    return BaseShape(call.node.target)


class Item(nn.Module):
    """Indexing."""

    def forward(self, span: Span, value: Any, index: Any) -> Any:
        """An element of a sequence or mapping of packed tensors."""
        return value[index]


@rule(operator.getitem, pure=True)
def pack_getitem(call: Call) -> nn.Module:
    """Elements of what another operation returned, and slices that leave the batch alone."""
    source, index = call.node.args
    assert isinstance(source, fx.Node)
    known = call.tensor(source)
    if known is None:
        return Item()
    call.require_channels()
    first = index[0] if isinstance(index, tuple) and index else index
    if not (first is Ellipsis or first == slice(None)):
        raise Unpackable("it indexes the batch")
    return ToBatch(operator.getitem)


pure(torch.arange, torch.zeros, torch.ones, torch.full, torch.linspace, torch.meshgrid)
pure("expand", "expand_as", "repeat", "new_zeros", "new_ones", "new_full")
pure(torch.zeros_like, torch.ones_like, F.one_hot)
