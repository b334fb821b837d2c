"""What a conversion tells of itself."""

import small
import torch
from torch import Tensor, nn

import treeify
from treeify.conversion.decide import Decision
from treeify.conversion.report import Conversion
from treeify.conversion.splits import SplitPoint, Splits
from treeify.engine.forms import Form
from treeify.tree import Tree


def decision(level: int, form: Form, macs: int, reason: str = "") -> Decision:
    return Decision(f"node{macs}", "Conv2d", level, form, reason, macs)


def report(*nodes: Decision) -> Conversion:
    splits = Splits((SplitPoint("layer2", 10, 20, 1),), Tree((3,)))
    return Conversion(splits, nodes, nodes, ("a note",))


def test_the_packed_fraction_is_of_the_branches_macs() -> None:
    shared = decision(0, Form.SHARED, 1000)
    assert report(shared).packed_fraction == 1
    nodes = (
        shared,
        decision(1, Form.PACKED, 2),
        decision(1, Form.BATCH, 1),
        decision(1, Form.BRANCHES, 1),
    )
    assert report(*nodes).packed_fraction == 0.75


def test_fallbacks_are_counted_by_operation_and_reason() -> None:
    each = [decision(1, Form.BRANCHES, macs, "no rule for Conv2d") for macs in range(2)]
    other = decision(1, Form.BRANCHES, 3, "its weights are shared")
    assert list(report(other, *each).fallbacks.items()) == [
        ("Conv2d: no rule for Conv2d", 2),
        ("Conv2d: its weights are shared", 1),
    ]


def test_a_report_prints_levels_reasons_and_notes() -> None:
    text = str(report(decision(0, Form.SHARED, 1), decision(1, Form.BRANCHES, 1, "it may not")))
    assert text.splitlines() == [
        "splits: layer2:3",
        "level 0 x 1: 1 shared",
        "level 1 x 3: 1 per branch",
        "0.0% of the branches' MACs run packed",
        "per branch: 1 x Conv2d: it may not",
        "a note",
    ]


class Unusual(small.SmallNet):
    """Has a module that cannot initialise itself, and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8, 1, 1))
        self.stage1.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x)) * self.gain).mean((2, 3)))


def test_notes_go_with_an_ensemble_into_smaller_ones() -> None:
    hne = treeify.hierarchicalize(
        Unusual(), ["stage1", "stage2"], init="fresh", example_input=small.EXAMPLE
    )
    notes = hne.conversion.notes
    assert notes[0].startswith("perturbed by 0.1 times")
    assert notes[1].startswith("initialised again by each layer's reset_parameters")
    assert notes[2] == "leaves out the hooks of stage1"
    assert hne.sub_ensemble(2).conversion.notes == notes


def test_a_report_keeps_no_weights() -> None:
    assert all(node.module is None for node in small.ensemble().conversion.nodes)
