"""What a graph's nodes give at two batch sizes, asked for while it is being traced."""

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from treeify.tracing.meta_kernels import MetaKernels
from treeify.tracing.side_effects import undo_side_effects

# One run cannot tell the batch from a dim that happens to be as large, two can. Neither batch
# is 1, which broadcasting and `squeeze` treat in their own way.
BATCHES = (2, 3)


class Sizes:
    """Outputs of a graph's nodes at both batch sizes, while the graph is being traced.

    They are on the meta device, as the model's `skeleton` is: it computes shapes and no values, so
    cheaply that the model's code may ask at any node, and without memory for the images. `image` is
    the shape of one, `(C, H, W)`.
    """

    def __init__(
        self,
        model: nn.Module,
        skeleton: nn.Module,
        image: tuple[int, ...],
        batches: tuple[int, int] = BATCHES,
    ) -> None:
        self._batches = batches
        self._model, self._skeleton, self._image = model, skeleton, image
        self._outputs: dict[fx.Node, list[Any]] = {}

    @contextmanager
    def new_pass(self, training: bool) -> Iterator[None]:
        """Forget the last graph, and put the model and its skeleton in one mode for another."""
        self._outputs.clear()
        with undo_side_effects(self._model), undo_side_effects(self._skeleton):
            self._model.train(training)
            self._skeleton.train(training)
            yield

    def shapes(self, node: fx.Node) -> tuple[torch.Size, torch.Size] | None:
        """Both shapes of a node's output; None if it is no tensor or cannot be computed."""
        small, large = self._outputs_of(node)
        if not isinstance(small, Tensor) or small.ndim != large.ndim:
            return None
        return small.shape, large.shape

    def tuple_length(self, node: fx.Node) -> int | None:
        """How many values a node gives; None if it gives no tuple, or another at each size."""
        outputs = self._outputs_of(node)
        lengths = {len(output) if isinstance(output, tuple) else None for output in outputs}
        return lengths.pop() if len(lengths) == 1 else None

    def _outputs_of(self, node: fx.Node) -> list[Any]:
        """A node's output at both batch sizes, all those before it being computed."""
        if node not in self._outputs:
            for other in node.graph.nodes:
                if other not in self._outputs:
                    self._outputs[other] = self._compute(other)
        return self._outputs[node]

    def _compute(self, node: fx.Node) -> list[Any]:
        """A node's output at both batch sizes; `NotImplemented` where it cannot be computed."""
        # Random draws are put back: else the check for those of the model would see these.
        states = random.getstate(), np.random.get_state()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), MetaKernels():
                return [self._run_node(node, run) for run in range(len(self._batches))]
        except Exception:  # whatever a library raises for what the meta device cannot do
            return [NotImplemented] * len(self._batches)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _run_node(self, node: fx.Node, run: int) -> Any:
        """A node's output at one of the batch sizes, if those that it reads could be computed."""

        def output_of(source: fx.Node) -> Any:
            output = self._outputs[source][run]
            if output is NotImplemented:
                raise ValueError(f"{source} could not be computed")
            return output

        args, kwargs = fx.map_arg((node.args, node.kwargs), output_of)
        if node.op == "placeholder":
            return torch.zeros(self._batches[run], *self._image, device="meta")
        if node.op == "get_attr":
            attribute = operator.attrgetter(str(node.target))(self._model)
            return attribute.to("meta") if isinstance(attribute, Tensor) else attribute
        if node.op == "call_module":
            return self._skeleton.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
