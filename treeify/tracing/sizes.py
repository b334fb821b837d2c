"""What a graph's nodes give at two batch sizes, asked for while it is being traced."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from treeify.tracing.meta_kernels import MetaKernels
from treeify.tracing.side_effects import undo_side_effects

# How many images what depends on their number is told apart with.
BATCHES = (2, 3)


class Sizes:
    """What a graph's nodes give at two batch sizes, on the meta device, while it is being traced.

    Args:
        private: the model that is traced.
        skeleton: its copy on the meta device.
        example: shape of one image, `(C, H, W)`.
    """

    def __init__(self, private: nn.Module, skeleton: nn.Module, example: tuple[int, ...]) -> None:
        self._private, self._skeleton, self._example = private, skeleton, example
        self._values: dict[fx.Node, list[Any]] = {}

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Put the model and its copy in one mode; undo what passes leave behind in them."""
        self._values.clear()
        with ExitStack() as stack:
            for model in (self._private, self._skeleton):
                stack.enter_context(undo_side_effects(model))
                model.train(training)
            yield

    def of(self, node: fx.Node) -> tuple[torch.Size, torch.Size] | None:
        """Both shapes of a node's output; None if it is no tensor or cannot be computed."""
        small, large = self._of(node)
        if not isinstance(small, Tensor) or small.ndim != large.ndim:
            return None
        return small.shape, large.shape

    def count(self, node: fx.Node) -> int | None:
        """How many tensors a node gives; None if it gives no tuple, or another at each size."""
        found = {len(own) if isinstance(own, tuple) else None for own in self._of(node)}
        return found.pop() if len(found) == 1 else None

    def _of(self, node: fx.Node) -> list[Any]:
        """A node's output at both batch sizes, all those before it being computed."""
        if node not in self._values:
            for other in node.graph.nodes:
                if other not in self._values:
                    self._values[other] = self._compute(other)
        return self._values[node]

    def _compute(self, node: fx.Node) -> list[Any]:
        """A node's output at both batch sizes; `NotImplemented` where it cannot be computed."""
        states = random.getstate(), np.random.get_state()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), MetaKernels():
                return [self._value(node, run) for run in range(len(BATCHES))]
        except Exception:  # whatever a library raises for what the meta device cannot do
            return [NotImplemented] * len(BATCHES)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _value(self, node: fx.Node, run: int) -> Any:
        def known(other: fx.Node) -> Any:
            found = self._values[other][run]
            if found is NotImplemented:
                raise ValueError(f"{other} is not known")
            return found

        args, kwargs = fx.map_arg((node.args, node.kwargs), known)
        if node.op == "placeholder":
            return torch.zeros(BATCHES[run], *self._example, device="meta")
        if node.op == "get_attr":
            found = operator.attrgetter(str(node.target))(self._private)
            return found.to("meta") if isinstance(found, Tensor) else found
        if node.op == "call_module":
            return self._skeleton.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
