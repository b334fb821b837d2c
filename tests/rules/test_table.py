"""The table of rules: one entry per operation, filled by several registrations."""

from typing import Any

import pytest
from torch import nn

from treeify.rules.table import (
    batch_rule,
    leaf_types,
    pure,
    rule,
    rules_of,
    widen_rules,
    widens,
)


def mine(call: Any) -> nn.Module:
    raise NotImplementedError


def grow(module: nn.Module, branches: int) -> None:
    raise NotImplementedError


def test_registering_a_rule_twice_names_both() -> None:
    with pytest.raises(ValueError, match=r"pack_norm.*mine"):
        rule(nn.BatchNorm2d)(mine)
    with pytest.raises(ValueError, match=r"run_linear.*mine"):
        batch_rule(nn.Linear)(mine)
    with pytest.raises(ValueError, match=r"pack_conv_module.*grow"):
        widens(nn.Conv2d)(grow)


def test_an_operation_without_rules() -> None:
    rules = rules_of("no_such_method")
    assert not rules.exist
    assert not rules.pure
    assert not rules.takes_counts


def test_registrations_of_one_operation_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.rules.table._TABLE", {})

    class Mixer(nn.Module):
        pass

    pure(Mixer)
    assert not rules_of(Mixer).exist
    assert Mixer not in leaf_types()
    batch_rule(Mixer, first=True, counts=True)(mine)
    rule(Mixer)(mine)
    widens(Mixer)(grow)
    rules = rules_of(Mixer)
    assert (rules.widen, rules.packed, rules.in_batch) == (grow, mine, mine)
    assert rules.pure
    assert rules.takes_counts
    assert leaf_types() == {Mixer}
    assert widen_rules() == {Mixer: grow}


def test_subclasses_have_rules_of_their_own() -> None:
    class Other(nn.Conv2d):
        pass

    assert not rules_of(Other).exist
