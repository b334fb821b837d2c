"""What is known of each node of a graph: where it stems from, what it gives, what it costs.

Found by running the graph at two batch sizes on the meta device.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from treeify.tracing.aliasing import Aliases
from treeify.tracing.functionalize import isolate
from treeify.tracing.meta_interpreter import GraphRunner, RecordingInterpreter
from treeify.tracing.sizes import BATCHES


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the base model, as seen at two batch sizes.

    Args:
        shape: its shape for the smaller batch.
        batched: whether dim 0 is the batch, one row per image.
        batch_dim: the one dim that grows with the batch, as the batch itself or a multiple of it
            (windows of every image); None where there is no such dim.
        images: how many there are in the smaller batch.
    """

    shape: tuple[int, ...]
    batched: bool
    batch_dim: int | None = None
    images: int = BATCHES[0]

    @property
    def branch_dim(self) -> int:
        """The dim in which branches ride: 1 (`[N, G*C, ...]`), or a new dim 0 (`[G, ...]`)."""
        return 1 if self.batched and len(self.shape) >= 2 else 0

    @property
    def counts_images(self) -> bool:
        """Whether the dim that grows with the batch has one place per image, not several."""
        return self.batch_dim is not None and self.shape[self.batch_dim] == self.images


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
    annotation: Facts = node.meta["treeify"]
    return annotation


def annotate(graph: fx.Graph, runner: GraphRunner, aliases: Aliases) -> None:
    """Leave the facts on every node of a graph, calls in it that change their inputs isolated."""
    small, large = (runner.record(graph, batch) for batch in runner.batches)
    if small.mutating_calls:
        isolate(graph, small.mutating_calls, aliases)
        annotate(graph, runner, aliases)  # the copies are nodes of their own
        return
    paths = _paths(graph)
    for node in graph.nodes:
        node.meta["treeify"] = Facts(
            path=paths[node],
            scope=_scope(node),
            value=tree_map(
                partial(merge_shapes, batches=runner.batches),
                small.shapes[node],
                large.shapes[node],
                is_leaf=_is_leaf,
            ),
            grows=growth(small.others[node], large.others[node]),
            macs=small.macs[node] // runner.batches[0],
            # A model that refuses some batches takes several images together.
            rows=runner.batches == BATCHES and _follows_batch(small, large, node),
        )


def _follows_batch(small: RecordingInterpreter, large: RecordingInterpreter, node: fx.Node) -> bool:
    """Whether only dim 0 of tensors differs between the batch sizes, and no number does."""
    shapes = (tree_leaves(run.shapes[node], is_leaf=_is_leaf) for run in (small, large))
    merged = [one == other or merge_shapes(one, other) for one, other in zip(*shapes, strict=True)]
    batched = all(shape.batched for shape in merged if isinstance(shape, TensorFacts))
    return batched and small.others[node] == large.others[node]


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, torch.Size)


def merge_shapes(
    small: torch.Size | None, large: torch.Size | None, batches: tuple[int, int] = BATCHES
) -> TensorFacts | None:
    """Merge the shapes of a tensor seen at both batch sizes; None for what is no tensor."""
    if small is None or large is None:
        return None
    batched = bool(small) and (small[0], large[0]) == batches and small[1:] == large[1:]
    pairs = enumerate(zip(small, large, strict=False))
    differing = [dim for dim, (size, other) in pairs if size != other]
    # A dim may hold a multiple of the batch, as windows of all images do; but where several dims
    # differ, or one in another way, no dim could be said to be the images'.
    grows = (
        len(small) == len(large)
        and len(differing) == 1
        and _grows_with_batch(small[differing[0]], large[differing[0]])
    )
    return TensorFacts(tuple(small), batched, differing[0] if grows else None, batches[0])


def _grows_with_batch(small: int, large: int) -> bool:
    return small * BATCHES[1] == large * BATCHES[0]


def growth(small: Any, large: Any) -> Any:
    """Where integers grow with the batch; None where a number differs in another way."""
    if isinstance(small, dict):
        parts = {key: growth(value, large[key]) for key, value in small.items()}
        return None if None in parts.values() else parts
    if isinstance(small, list | tuple):
        members = tuple(growth(value, other) for value, other in zip(small, large, strict=True))
        return None if None in members else members
    if small == large:
        return False
    are_integers = type(small) is int and type(large) is int
    return True if are_integers and _grows_with_batch(small, large) else None


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
