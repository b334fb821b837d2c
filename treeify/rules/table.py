"""The table of rules: how an operation runs on packed branches.

There are three kinds. A *widen* rule turns a module into the same module with `G` times the
channels and groups, so that the packed module is an ordinary PyTorch module. An *operation* rule
looks at one call and returns the operation on packed branches, `[N, G*C, ...]`; a *batch rule* that
on branches in the batch, `[G*N, ...]`. Both may refuse with `Unpackable`; if all do, the call runs
per branch and the conversion report says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn
from torch.fx.node import map_arg

from treeify.engine.packed_tensors import Widen
from treeify.tracing.facts import Facts, TensorFacts, facts


class Unpackable(Exception):  # noqa: N818 - a verdict, not an error
    """Why a rule does not apply to a call."""


@dataclass(frozen=True)
class Call:
    """One call of the base graph, as a rule sees it.

    Args:
        node: the call.
        module: for a module call, the base architecture's module (on the meta device).
        storage: for a module call, the module that holds its packed tensors.
        branches: branches `G` of the call's level.
        ratio: branches here for each branch of the first argument's level.
        varying: arguments that differ from branch to branch; the others are one value for all.
    """

    node: fx.Node
    module: nn.Module | None
    storage: nn.Module | None
    branches: int
    ratio: int
    varying: Set[fx.Node] = frozenset()

    @property
    def facts(self) -> Facts:
        """Facts of the call's result."""
        return facts(self.node)

    def tensor(self, argument: Any) -> TensorFacts | None:
        """Facts of an argument if it is a single tensor."""
        if not isinstance(argument, fx.Node):
            return None
        value = facts(argument).value
        return value if isinstance(value, TensorFacts) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def input_facts(self) -> TensorFacts:
        """Facts of the first argument, which must be a packable tensor.

        Raises:
            Unpackable: it is not a tensor with the batch at dim 0 and a dim 1.
        """
        known = self.tensor(self.argument(0, "input"))
        if known is None or known.branch_dim != 1:
            raise Unpackable("its input has no batch at dim 0")
        return known

    def tensor_arguments(self) -> list[TensorFacts]:
        """Facts of every tensor among the arguments, nested ones included."""
        found: list[TensorFacts] = []
        map_arg((self.node.args, self.node.kwargs), lambda node: found.extend(facts(node).tensors))
        return found

    def batch_facts(self) -> TensorFacts:
        """Facts of the first argument, which must be a tensor with a dim that grows with the batch.

        Raises:
            Unpackable: it is not.
        """
        known = self.tensor(self.argument(0, "input"))
        if known is None or known.batch_dim is None:
            raise Unpackable("its input has no batch dim")
        return known

    def own_tensors(self, *places: tuple[int, str]) -> list[TensorFacts | None]:
        """Facts of arguments of which each branch has its own tensor, `[G, ...]`, or None.

        Args:
            places: of each argument, its position and name.

        Raises:
            Unpackable: one is the same for all branches, or has a batch.
        """
        found = []
        for place in places:
            argument = self.argument(*place)
            known = self.tensor(argument)
            if argument is not None:
                if known is None or argument not in self.varying:
                    raise Unpackable("its weights are shared")
                if known.batch_dim is not None:
                    raise Unpackable("its weights have a batch")
            found.append(known)
        return found

    def require_one_tensor(self) -> TensorFacts:
        """Facts of the only tensor among the arguments, which must have a batch dim.

        Raises:
            Unpackable: there are other tensors, or it has none.
        """
        if len(self.tensor_arguments()) != 1:
            raise Unpackable("it reads more than one tensor")
        return self.batch_facts()

    def require_channels(self) -> None:
        """Raise Unpackable unless every tensor in and out has the batch at dim 0 and a dim 1."""
        if not all(known.branch_dim == 1 for known in self.tensor_arguments()):
            raise Unpackable("an argument has no batch at dim 0")
        if not self.facts.tensors or not all(known.branch_dim == 1 for known in self.facts.tensors):
            raise Unpackable("its result has no batch at dim 0")


def require_rank(known: TensorFacts, name: str) -> None:
    """Refuse `[N, C]` or `[N, H, W]`, which torch takes for an image without a batch.

    Args:
        known: facts of the input.
        name: of the operation; `...2d` works on 2 dims after batch and channels, one without a
            number on any.

    Raises:
        Unpackable: the input is no batch of channels.
    """
    spatial = re.search(r"(\d)d", name)
    rank = len(known.shape)
    if known.batch_dim != 0:
        raise Unpackable("its input does not begin with the batch")
    if rank < 3 or (spatial is not None and rank != int(spatial[1]) + 2):
        raise Unpackable("its input has no channel dim")


Rule = Callable[[Call], nn.Module]
_R = TypeVar("_R", bound=Rule)
_W = TypeVar("_W", bound=Callable[..., None])

WIDEN: dict[type[nn.Module], Widen] = {}
_RULES: dict[Any, Rule] = {}
_BATCH_RULES: dict[Any, Rule] = {}
_IN_BATCH_FIRST: dict[Any, Callable[[Call], bool]] = {}
_PURE: set[Any] = set()
_COUNTING: set[Any] = set()


def widens(*types: type[nn.Module]) -> Callable[[_W], _W]:
    """Register how modules of exactly these types get more branches, in place: `(module, G)`."""

    def register(function: _W) -> _W:
        for kind in types:
            _claim(WIDEN, kind, function)
        return function

    return register


def rule(*targets: Any, pure: bool = False) -> Callable[[_R], _R]:
    """Register the rule of module types, functions or method names.

    Args:
        targets: exact module types, functions, or names of tensor methods.
        pure: the result depends on nothing but the arguments, so that siblings reading the same
            values may share it.
    """

    def register(function: _R) -> _R:
        for target in targets:
            _claim(_RULES, target, function)
        if pure:
            _PURE.update(targets)
        return function

    return register


def batch_rule(
    *targets: Any,
    pure: bool = False,
    first: bool | Callable[[Call], bool] = False,
    counts: bool = False,
) -> Callable[[_R], _R]:
    """Register how module types, functions or method names run with branches in the batch.

    Args:
        targets: exact module types, functions, or names of tensor methods.
        pure: the result depends on nothing but the arguments.
        first: whether to prefer this to the packed rule even for packed inputs.
        counts: whether numbers that grow with the batch are sizes of the result: in the batch they
            are multiplied by the branches. Without it, calls that read one run per branch.
    """

    def register(function: _R) -> _R:
        for target in targets:
            _claim(_BATCH_RULES, target, function)
        if pure:
            _PURE.update(targets)
        if counts:
            _COUNTING.update(targets)
        if first:
            prefers = first if callable(first) else lambda call: True
            _IN_BATCH_FIRST.update(dict.fromkeys(targets, prefers))
        return function

    return register


def pure(*targets: Any) -> None:
    """Declare operations without a rule pure: siblings reading the same values share results."""
    _PURE.update(targets)


def _claim(table: dict[Any, Any], key: Any, function: Callable[..., Any]) -> None:
    if key in table:
        name = getattr(key, "__name__", key)
        raise ValueError(
            f"{name} already has the rule {_qualified(table[key])};"
            f" {_qualified(function)} cannot be a second one"
        )
    table[key] = function


def _qualified(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def find(call: Call) -> Rule | None:
    """The rule for a call, by the module's exact type, the function or the method's name."""
    return _RULES.get(_key(call.node, call.module))


def find_in_batch(call: Call) -> Rule | None:
    """The batch rule for a call, likewise."""
    return _BATCH_RULES.get(_key(call.node, call.module))


def is_in_batch_first(call: Call) -> bool:
    """Whether a call is better run in the batch, whatever form its inputs are in."""
    prefers = _IN_BATCH_FIRST.get(_key(call.node, call.module))
    return prefers is not None and prefers(call)


def takes_counts(call: Call) -> bool:
    """Whether the batch rule of a call takes numbers that grow with the batch."""
    return _key(call.node, call.module) in _COUNTING


def is_pure(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether siblings with the same inputs may share the call's result."""
    return _key(node, module) in _PURE


def _key(node: fx.Node, module: nn.Module | None) -> Any:
    return type(module) if module is not None else node.target


def is_known(kind: Any) -> bool:
    """Whether rules know a function or module type, and so what it asks of its input."""
    return kind in WIDEN or kind in _RULES or kind in _BATCH_RULES


def leaf_types() -> frozenset[type[nn.Module]]:
    """Module types that rules handle whole, so tracing must not open them."""
    known = (*_RULES, *_BATCH_RULES)
    kinds = {key for key in known if isinstance(key, type) and issubclass(key, nn.Module)}
    return frozenset(kinds | set(WIDEN))
