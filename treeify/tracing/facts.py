"""What is known of each node of a graph: where it stems from, what it gives, what it costs.

Found by running the graph at two batch sizes on the meta device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from treeify.tracing.aliasing import Aliases
from treeify.tracing.functionalize import isolate
from treeify.tracing.meta_interpreter import Recorder, Running
from treeify.tracing.sizes import BATCHES


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the base model, as seen at two batch sizes.

    Args:
        shape: its shape for a batch of 2.
        batched: whether dim 0 is the batch, one row per image.
        batch_dim: the one dim that grows with the batch, as the batch itself or a multiple of it
            (windows of every image); None where there is no such dim.
    """

    shape: tuple[int, ...]
    batched: bool
    batch_dim: int | None = None

    @property
    def branch_dim(self) -> int:
        """The dim in which branches ride: 1 (`[N, G*C, ...]`), or a new dim 0 (`[G, ...]`)."""
        return 1 if self.batched and len(self.shape) >= 2 else 0

    @property
    def counts_images(self) -> bool:
        """Whether the dim that grows with the batch has one place per image, not several."""
        return self.batch_dim is not None and self.shape[self.batch_dim] == BATCHES[0]


@dataclass(frozen=True)
class Facts:
    """What is known of one node.

    Args:
        path: unique readable name: the module path, and for functions the operation inside it.
        scope: path of the module the node stems from.
        value: the node's output with every tensor replaced by its `TensorFacts`.
        grows: the node's output with every integer replaced by whether it is proportional to the
            batch; None where a number depends on the batch in another way.
        macs: multiply-accumulates per image; counted for evaluation only.
        rows: whether dropping images from the batch means dropping rows of the tensors, no more.
    """

    path: str
    scope: str
    value: Any
    grows: Any
    macs: int
    rows: bool

    @property
    def tensors(self) -> list[TensorFacts]:
        """The tensors in the output."""
        return [leaf for leaf in tree_leaves(self.value) if isinstance(leaf, TensorFacts)]


def facts(node: fx.Node) -> Facts:
    """The annotation `trace` left on a node."""
    found: Facts = node.meta["treeify"]
    return found


def annotate(graph: fx.Graph, model: Running, aliases: Aliases) -> None:
    """Leave the facts on every node of a graph, calls in it that change their inputs isolated.

    Raises:
        InPlaceError: such a call changes what is read later.
        InputError: the model does not run on the example's shape.
    """
    small, large = (model.record(graph, batch) for batch in BATCHES)
    if small.changing:
        isolate(graph, small.changing, aliases)
        annotate(graph, model, aliases)
        return
    paths = _paths(graph)
    for node in graph.nodes:
        scope = _scope(node)
        node.meta["treeify"] = Facts(
            path=paths[node],
            scope=scope,
            value=tree_map(_merge, small.values[node], large.values[node], is_leaf=_is_leaf),
            grows=_growth(small.others[node], large.others[node]),
            macs=small.macs[node] // BATCHES[0],
            rows=_follows_batch(small, large, node),
        )


def _follows_batch(small: Recorder, large: Recorder, node: fx.Node) -> bool:
    """Whether only dim 0 of tensors differs between the batch sizes, and no number does."""
    shapes = zip(
        *(tree_leaves(run.values[node], is_leaf=_is_leaf) for run in (small, large)), strict=True
    )
    same = all(
        one is None or other is None or one == other or _compare(one, other).batched
        for one, other in shapes
    )
    return same and small.others[node] == large.others[node]


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, torch.Size)


def _merge(small: torch.Size | None, large: torch.Size | None) -> TensorFacts | None:
    return None if small is None or large is None else _compare(small, large)


def _compare(small: torch.Size, large: torch.Size) -> TensorFacts:
    """Merge the shapes seen at both batch sizes."""
    rest_fixed = small[1:] == large[1:]
    batched = bool(small) and (small[0], large[0]) == BATCHES and rest_fixed
    differing = [
        dim for dim, sizes in enumerate(zip(small, large, strict=False)) if sizes[0] != sizes[1]
    ]
    same_rank = len(small) == len(large)
    dim = differing[0] if same_rank and len(differing) == 1 else None
    if dim is not None and not _grows_with_batch(small[dim], large[dim]):
        dim = None
    return TensorFacts(tuple(small), batched, dim)


def _grows_with_batch(small: int, large: int) -> bool:
    return small * BATCHES[1] == large * BATCHES[0]


def _growth(small: Any, large: Any) -> Any:
    """Where integers grow with the batch; None where a number differs in another way."""
    if isinstance(small, dict):
        found = {key: _growth(own, large[key]) for key, own in small.items()}
        return None if None in found.values() else found
    if isinstance(small, list | tuple):
        parts = [_growth(own, other) for own, other in zip(small, large, strict=True)]
        return None if None in parts else tuple(parts)
    if small == large:
        return False
    whole = type(small) is int and type(large) is int
    return True if whole and _grows_with_batch(small, large) else None


def _scope(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else enclosing(node)


def enclosing(node: fx.Node) -> str:
    """The innermost module whose forward has the node's line; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    called = node.target if node.op == "call_module" else None
    return next((str(path) for path, _ in reversed(stack.values()) if path != called), "")


def _paths(graph: fx.Graph) -> dict[fx.Node, str]:
    """Readable unique names: `layer1.0.conv1`, `layer1.0.add`, `layer1.0.relu_1` if repeated."""
    paths: dict[fx.Node, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        scope = _scope(node)
        if node.op in ("call_module", "get_attr", "placeholder", "output"):
            name = str(node.target)
        else:
            operation = getattr(node.target, "__name__", str(node.target)).strip("_")
            name = f"{scope}.{operation}" if scope else operation
        paths[node] = name if not seen[name] else f"{name}_{seen[name]}"
        seen[name] += 1
    return paths
