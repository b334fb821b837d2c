"""A step: what one size needs beyond the one before, as a plain module."""

from dataclasses import dataclass

from torch import Tensor, fx, nn

from treeify.deploy.values import BatchDim
from treeify.tree import Span

# A level and the branches that a call of it computes.
Key = tuple[int, Span]


@dataclass(frozen=True)
class Kept:
    """A tensor that one step gives and later ones read.

    Args:
        name: unique over all steps.
        example: such a tensor, for two images.
        batch_dim: the dim that grows with the batch, and how many times the images; None if none.
    """

    name: str
    example: Tensor
    batch_dim: BatchDim


class Step(nn.Module):
    """Computes leaves from `start` to `leaves`: tensors in, tensors out.

    Args:
        start: leaves that earlier steps computed.
        leaves: leaves that are computed after this step.
        inputs: names of its arguments; `images`, or what an earlier step kept.
        outputs: names of its results: the new leaves' outputs, `[N, leaves - start, K]` each, then
            what later steps read.
        run: the graph. It calls one module for each level, or for each branch where a level is
            looped, which hold weights of their own.
        kept: what it gives to later steps.
        examples: arguments for a batch of two images.
        batch_dims: per argument the dim that grows with the batch, and how many times the images.
        calls: per module that `run` calls, the level and the branches it computes.
    """

    def __init__(
        self,
        start: int,
        leaves: int,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        run: fx.GraphModule,
        kept: tuple[Kept, ...],
        examples: tuple[Tensor, ...],
        batch_dims: tuple[BatchDim, ...],
        calls: dict[str, Key],
    ) -> None:
        super().__init__()
        self.start, self.leaves, self.inputs, self.outputs = start, leaves, inputs, outputs
        self.run, self.kept, self.calls = run, kept, calls
        self.examples, self.batch_dims = examples, batch_dims

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors named by `inputs` -> those named by `outputs`."""
        results: tuple[Tensor, ...] = self.run(*tensors)
        return results

    def extra_repr(self) -> str:
        """From how many leaves to how many, and of what."""
        return f"{self.start} -> {self.leaves} leaves, of {', '.join(self.inputs)}"


def output_names(count: int) -> tuple[str, ...]:
    """Names of the leaves' outputs."""
    return ("logits",) if count == 1 else tuple(f"logits_{index}" for index in range(count))


def item(values: tuple[Tensor, ...], index: int) -> Tensor:
    """One result of a level's call."""
    return values[index]
