"""Aliases: values of a graph in the memory of another one, so that changing one changes both.

Which values may be aliases is read from the graph. Only if one of them is read after an in-place
operation on another is the graph run, to see where in memory they lie.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from treeify.errors import TraceError

VIEWS = {
    *("view", "reshape", "transpose", "permute", "chunk", "split", "narrow", "unbind", "flatten"),
    *("squeeze", "unsqueeze", "expand", "select", "getitem", "swapaxes", "movedim", "view_as", "t"),
}
# Further operations whose result may be their input, or lie within it.
_ALIASING = VIEWS | {
    *("contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
    *("detach", "identity", "getattr", "unflatten", "ravel", "moveaxis", "swapdims", "expand_as"),
    *("reshape_as", "diagonal", "unfold", "as_strided", "tensor_split", "split_with_sizes"),
    *("hsplit", "vsplit", "dsplit", "broadcast_to", "broadcast_tensors", "positive", "real"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
}
_ALIASING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
# Attributes of tensors that are no tensors.
_NUMBERS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "training")
_LIBRARY = ("torch", "_operator", "math", "builtins")

Values = Mapping[fx.Node, Any]


class InPlaceError(TraceError):
    """An in-place operation, `node`, that no other can stand for."""

    def __init__(self, node: fx.Node, **texts: str) -> None:
        super().__init__(**texts)
        self.node = node


class ReadLaterError(InPlaceError):
    """An operation that changes a value in place, where `reader` reads it or an alias afterwards.

    `alias` says what lies in the same memory, as words after a comma.
    """

    def __init__(self, node: fx.Node, changed: fx.Node, alias: str, reader: fx.Node) -> None:
        super().__init__(
            node,
            where=f"{node.name} changes {changed.name} in place{alias},"
            f" which {reader.name} reads afterwards.",
            expected="in-place operations on values of their own",
            next_step="Use the out-of-place operation, or move both lines into a module of their"
            " own: it then runs as one call per branch.",
        )


class Aliases:
    """Aliases in a graph whose in-place operations are being replaced.

    `root` holds what the graph's targets name; `run` computes every node in its present state.
    """

    def __init__(self, root: nn.Module, run: Callable[[], Values]) -> None:
        self._root, self._run = root, run

    def read_later(self, changed: fx.Node, node: fx.Node) -> list[fx.Node]:
        """The values that are the same tensor as `changed`, and read after `node` changes it.

        Raises:
            ReadLaterError: another value that overlaps with the one changed is read later.
        """
        late = {
            other: readers[0]
            for other in self._related(changed, node)
            if (readers := [user for user in other.users if user > node])
        }
        late.pop(changed, None)
        if not late:
            return []
        # Whether a `contiguous` or `reshape` copies depends on memory formats: no graph shows it.
        values = self._run()
        same = []
        for other, reader in late.items():
            if _is_same(values[changed], values[other]):
                same.append(other)
            elif _overlap(values[changed], values[other]):
                raise ReadLaterError(node, changed, f", and {other.name} with it", reader)
        return same

    def _related(self, start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        """Values computed before `end` that may lie where `start` does."""
        seen, pending = {start}, [start]
        while pending:
            value = pending.pop()
            yield value
            related = list(value.all_input_nodes) if self._may_alias(value) else []
            related += [user for user in value.users if user < end and self._may_alias(user)]
            pending += [other for other in related if other not in seen]
            seen.update(related)

    def _may_alias(self, node: fx.Node) -> bool:
        """Whether a node may give back its input, or a part of it."""
        if node.op == "call_method":
            return str(node.target) in _ALIASING
        if node.op == "call_function":
            if node.target is getattr:
                return node.args[1] not in _NUMBERS
            # A function of the user's may give back anything.
            return not is_library(node.target) or getattr(node.target, "__name__", "") in _ALIASING
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            is_torchs = type(module).__module__.startswith("torch.nn.modules")
            return not is_torchs or isinstance(module, _ALIASING_MODULES)
        return False


def is_library(code: Any) -> bool:
    """Whether a function or class is torch's or Python's own."""
    return str(getattr(code, "__module__", "")).partition(".")[0] in _LIBRARY


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    first, second = ((_storage(each), each.dtype, *_geometry(each)) for each in (one, other))
    return first == second


def _overlap(one: Any, other: Any) -> bool:
    """Whether tensors of two values share an element of memory."""
    return any(
        _share_elements(first, second)
        for first in tree_leaves(one)
        for second in tree_leaves(other)
        if isinstance(first, Tensor) and isinstance(second, Tensor)
        if _storage(first) == _storage(second)
    )


def _share_elements(one: Tensor, other: Tensor) -> bool:
    """Whether tensors in one storage share an element of it; strides may leave gaps for others."""
    if one.dtype != other.dtype:
        return True
    elements = torch.arange(one.untyped_storage().nbytes() // one.element_size())
    covered = torch.zeros(len(elements), dtype=torch.bool)
    covered[elements.as_strided(*_geometry(one)).flatten()] = True
    return bool(covered[elements.as_strided(*_geometry(other)).flatten()].any())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _geometry(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())
