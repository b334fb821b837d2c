"""How nodes run is decided before anything is written, and can be read."""

from dataclasses import FrozenInstanceError

import pytest
import small
import torch
from torch import Tensor, fx, nn

from treeify.conversion.decide import Decider, Decision, overwriting, without_in_place
from treeify.conversion.levels import levels
from treeify.engine.forms import Form


class Residual(small.SmallNet):
    """Reads once more what an activation reads, and sums over the batch, which no rule takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.alone = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1[:2](self.stem(x))
        twice = x + x
        x = self.alone(self.stage2[0](self.seen(x) + twice))
        return self.head(torch.cumsum(x, 0).mean((2, 3)))


def decisions_on(model: nn.Module, splits: list[str]) -> dict[str, Decision]:
    hne = small.converted(model, splits)
    graph = hne.traced.graphs[False]
    decider = Decider(
        hne.traced,
        without_in_place(hne.skeleton),
        levels(graph, [split.partition(":")[0] for split in splits]),
        hne._slots,
        hne,
        hne.tree,
    )
    before = str(graph)
    decisions = decider.run(graph)
    assert str(graph) == before
    return {decision.path: decision for decision in decisions.values()}


def test_the_form_of_a_node_follows_its_rule_or_the_lack_of_one() -> None:
    decisions = decisions_on(Residual(), ["stage1:2", "stage2:3"])
    assert decisions["stem.0"].form is Form.SHARED
    assert decisions["stage1.0"].form is decisions["stage2.0"].form is Form.PACKED
    assert (decisions["stage1.0"].level, decisions["stage2.0"].level) == (1, 2)
    assert decisions["cumsum"].form is Form.BRANCHES
    assert decisions["cumsum"].reason == "it works along the batch"
    assert all(not one.reason for one in decisions.values() if one.form is not Form.BRANCHES)


def test_the_first_operation_after_a_split_reads_one_copy_for_all_siblings() -> None:
    decisions = decisions_on(small.SmallNet(), ["stage1:2", "stage2:3"])
    siblings = {path for path, decision in decisions.items() if decision.reads_parents}
    assert siblings == {"stage1.0", "stage2.0"}


def test_an_activation_overwrites_only_what_nothing_else_reads() -> None:
    decisions = decisions_on(Residual(), ["stage1:2"])
    assert decisions["alone"].overwrites is True
    assert decisions["seen"].overwrites is False
    assert decisions["stem.2"].overwrites is None


def test_a_decision_is_a_frozen_value_that_prints() -> None:
    decision = decisions_on(small.SmallNet(), ["stage1"])["stage1.0"]
    assert "operation='Conv2d', level=1, form=<Form.PACKED" in str(decision)
    with pytest.raises(FrozenInstanceError):
        decision.level = 2  # type: ignore[misc]
    assert decision == decisions_on(small.SmallNet(), ["stage1"])["stage1.0"]


def test_without_in_place_leaves_the_given_architecture_as_it_is() -> None:
    skeleton = nn.Sequential(nn.ReLU(inplace=True), nn.Sequential(nn.ReLU6(inplace=True)))
    base = without_in_place(skeleton)
    assert not base.get_submodule("0").inplace
    assert not base.get_submodule("1.0").inplace
    assert skeleton[0].inplace


@pytest.mark.parametrize("other", [True, False, None])
def test_an_activation_overwrites_only_if_all_of_its_calls_may(other: bool | None) -> None:
    graph = fx.Graph()
    calls = [graph.call_module("activation") for _ in range(2)]
    modes = [
        {call: Decision("activation", "ReLU", 1, Form.PACKED, "", 0, overwrites=overwrites)}
        for call, overwrites in zip(calls, (True, other), strict=True)
    ]
    assert overwriting(modes) == (set() if other is False else {"activation"})
