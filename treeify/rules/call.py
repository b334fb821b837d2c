"""A call of the base graph as rules see it, and what they may ask of it."""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from treeify.tracing.facts import Facts, TensorFacts, facts


class Unpackable(Exception):  # noqa: N818 - a verdict, not an error
    """Why a rule does not apply to a call."""


@dataclass(frozen=True)
class Call:
    """One call of the base graph, as a rule sees it.

    Args:
        node: the call.
        module: for a module call, the base architecture's module (on the meta device); else None.
        packed_module: for a module call, the module that holds its packed tensors; else None.
        branches: branches `G` of the call's level.
        ratio: branches here for each branch of the first argument's level.
        varying: arguments that differ from branch to branch; the others are one value for all.
    """

    node: fx.Node
    module: Any
    packed_module: Any
    branches: int
    ratio: int
    varying: Set[fx.Node] = frozenset()

    @property
    def kind(self) -> Any:
        """What rules are registered for."""
        return kind_of(self.node, self.module)

    @property
    def target(self) -> Any:
        """What the call runs: the module with the packed tensors, a function or a method's name."""
        return self.node.target if self.module is None else self.packed_module

    @property
    def name(self) -> str:
        """The name of the module's class, of the function or of the method."""
        return str(getattr(self.kind, "__name__", self.kind))

    @property
    def facts(self) -> Facts:
        """Facts of the call's result."""
        return facts(self.node)

    def tensor(self, argument: Any) -> TensorFacts | None:
        """Facts of an argument if it is a single tensor."""
        value = facts(argument).value if isinstance(argument, fx.Node) else None
        return value if isinstance(value, TensorFacts) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def tensor_arguments(self) -> list[TensorFacts]:
        """Facts of every tensor among the arguments, nested ones included."""
        tensors: list[TensorFacts] = []
        map_arg(
            (self.node.args, self.node.kwargs), lambda node: tensors.extend(facts(node).tensors)
        )
        return tensors

    def input_facts(self) -> TensorFacts:
        """Facts of the first argument; Unpackable without a batch at dim 0 and a dim 1."""
        operand = self.tensor(self.argument(0, "input"))
        if operand is None or operand.branch_dim != 1:
            raise Unpackable("its input has no batch at dim 0")
        return operand

    def batch_facts(self) -> TensorFacts:
        """Facts of the first argument; Unpackable without a dim that grows with the batch."""
        operand = self.tensor(self.argument(0, "input"))
        if operand is None or operand.batch_dim is None:
            raise Unpackable("its input has no batch dim")
        return operand

    def batch_first_facts(self, least_rank: int = 1) -> TensorFacts:
        """Facts of the first argument; Unpackable unless batch first, of at least that rank."""
        operand = self.batch_facts()
        if operand.batch_dim != 0 or len(operand.shape) < least_rank:
            raise Unpackable("its input does not begin with the batch")
        return operand

    def result_facts(self) -> TensorFacts:
        """Facts of the result; Unpackable unless it is a tensor that grows with the batch."""
        result = self.facts.value
        if not isinstance(result, TensorFacts) or result.batch_dim is None:
            raise Unpackable("its result has no batch dim")
        return result

    def branch_tensors(self, *places: tuple[int, str]) -> list[TensorFacts | None]:
        """Facts of arguments of which each branch has its own tensor, `[G, ...]`, or None.

        Args:
            places: of each argument, its position and name.

        Raises:
            Unpackable: one is the same for all branches, or has a batch.
        """
        tensors = []
        for place in places:
            argument = self.argument(*place)
            tensor = self.tensor(argument)
            if argument is not None:
                if tensor is None or argument not in self.varying:
                    raise Unpackable("its weights are shared")
                if tensor.batch_dim is not None:
                    raise Unpackable("its weights have a batch")
            tensors.append(tensor)
        return tensors

    def require_one_tensor(self) -> TensorFacts:
        """Facts of the single tensor argument; Unpackable if there are more, or no batch dim."""
        if len(self.tensor_arguments()) != 1:
            raise Unpackable("it reads more than one tensor")
        return self.batch_facts()

    def require_channels(self) -> None:
        """Raise Unpackable unless every tensor in and out has the batch at dim 0 and a dim 1."""
        if not all(operand.branch_dim == 1 for operand in self.tensor_arguments()):
            raise Unpackable("an argument has no batch at dim 0")
        results = self.facts.tensors
        if not results or not all(result.branch_dim == 1 for result in results):
            raise Unpackable("its result has no batch at dim 0")

    def require_rank(self) -> None:
        """Refuse `[N, C]` or `[N, H, W]`, which torch takes for an image without a batch.

        A call named `...2d` works on 2 dims after batch and channels, one without a number on any.

        Raises:
            Unpackable: the first argument is no batch of channels.
        """
        operand = self.batch_first_facts()
        spatial = re.search(r"(\d)d", self.name)
        rank = len(operand.shape)
        if rank < 3 or (spatial is not None and rank != int(spatial[1]) + 2):
            raise Unpackable("its input has no channel dim")


def kind_of(node: fx.Node, module: nn.Module | None) -> Any:
    """What rules are registered for: a module's exact type, a function or a method's name."""
    return node.target if module is None else type(module)
