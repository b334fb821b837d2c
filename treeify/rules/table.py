"""The table of rules: how an operation runs on packed branches.

There are three kinds. A *widen* rule turns a module into the same module with `G` times the
channels and groups, so that the packed module is an ordinary PyTorch module. A *packed* rule
looks at one call and returns the operation on packed branches, `[N, G*C, ...]`; a *batch rule* that
on branches in the batch, `[G*N, ...]`. Both may refuse with `Unpackable`; if all do, the call runs
per branch and the conversion report says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from treeify.engine.packed_tensors import Widen
from treeify.rules.call import Call

Rule = Callable[[Call], nn.Module]
_R = TypeVar("_R", bound=Rule)
_W = TypeVar("_W", bound=Callable[..., None])
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class OperationRules:
    """All that is registered for an operation.

    Args:
        widen: gives a module more branches, in place: `(module, G)`.
        packed: runs a call on branches in the channels, `[N, G*C, ...]`.
        in_batch: runs a call on branches in the batch, `[G*N, ...]`.
        prefers_batch: whether a call is better run in the batch even where its input is packed.
        pure: whether the result depends on nothing but the arguments, so that siblings reading the
            same values may share it.
        takes_counts: whether numbers that grow with the batch are sizes of the result.
    """

    widen: Widen | None = None
    packed: Rule | None = None
    in_batch: Rule | None = None
    prefers_batch: Callable[[Call], bool] = lambda call: False
    pure: bool = False
    takes_counts: bool = False

    @property
    def exist(self) -> bool:
        """Whether any rule knows the operation, and so what it asks of its input."""
        return any((self.widen, self.packed, self.in_batch))


_TABLE: dict[Any, OperationRules] = {}
_NOTHING = OperationRules()


def rules_of(kind: Any) -> OperationRules:
    """The rules of a module type, of exactly that type, of a function or of a method's name."""
    return _TABLE.get(kind, _NOTHING)


def widen_rules() -> dict[type[nn.Module], Widen]:
    """How modules get more branches, by their exact type."""
    return {kind: rules.widen for kind, rules in _TABLE.items() if rules.widen is not None}


def leaf_types() -> frozenset[type[nn.Module]]:
    """Module types that rules handle as one operation, so that tracing makes them leaf modules."""
    return frozenset(
        kind
        for kind, rules in _TABLE.items()
        if rules.exist and isinstance(kind, type) and issubclass(kind, nn.Module)
    )


def widens(*types: type[nn.Module]) -> Callable[[_W], _W]:
    """Register how modules of exactly these types get more branches, in place: `(module, G)`."""
    return _registering(types, "widen")


def rule(*targets: Any, pure: bool = False) -> Callable[[_R], _R]:
    """Register how module types, functions or method names run with branches in the channels.

    Args:
        targets: exact module types, functions, or names of tensor methods.
        pure: the result depends on nothing but the arguments, so that siblings reading the same
            values may share it.
    """
    return _registering(targets, "packed", pure=pure)


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
    prefers_batch = (lambda call: True) if first is True else first
    return _registering(
        targets, "in_batch", pure=pure, takes_counts=counts, prefers_batch=prefers_batch
    )


def pure(*targets: Any) -> None:
    """Declare operations without a rule pure: siblings reading the same values share results."""
    _enter(targets, pure=True)


def _registering(kinds: tuple[Any, ...], name: str, **flags: Any) -> Callable[[_F], _F]:
    """Enters a function under a name, with the flags that are set.

    What one rule says of an operation, another does not take back.
    """

    def register(function: _F) -> _F:
        _enter(kinds, **{name: function}, **{key: flag for key, flag in flags.items() if flag})
        return function

    return register


def _enter(kinds: tuple[Any, ...], **entries: Any) -> None:
    for kind in kinds:
        rules = rules_of(kind)
        for name in ("widen", "packed", "in_batch"):
            if name in entries and (registered := getattr(rules, name)):
                raise ValueError(
                    f"{getattr(kind, '__name__', kind)} already has the rule"
                    f" {_qualified(registered)}; {_qualified(entries[name])} cannot be a second one"
                )
        _TABLE[kind] = replace(rules, **entries)


def _qualified(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
