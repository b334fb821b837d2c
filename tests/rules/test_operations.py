"""Each packed operation against the plain one mapped over the branches: float64, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_cases import CASES, OPERATIONS, REFUSED, WIDTH, Around, Do
from oracle import assert_equals_networks
from torch import nn

import treeify
from treeify.conversion.assemble import assemble
from treeify.conversion.initialize import initial_weights
from treeify.engine.forms import Form

# Parts of `Around` that every branch has of its own, by where it is split.
BRANCHED = {
    "operation": ("operation",),
    "before": ("before", "operation"),
    "input": ("stem", "before", "operation"),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    fanout=st.integers(2, 5),
    where=st.sampled_from(sorted(BRANCHED)),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_packed_equals_mapped_over_branches(
    name: str, fanout: int, where: str, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    model = Around(CASES[name]).double()
    example = torch.zeros(1, 3, 6, 6, dtype=torch.float64)
    # As saved, since a level of its own needs no weights here.
    source = initial_weights(model, None, "perturb", seed)
    splits = [f"{where}:{fanout}"]
    hne = assemble(model, None, splits, source, example_input=example, saved=True)
    count = data.draw(st.integers(1, fanout))
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    assert_equals_networks(hne, x, count, BRANCHED[where])


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operation_has_a_rule(name: str) -> None:
    example = torch.zeros(1, 3, 6, 6)
    hne = treeify.hierarchicalize(
        Around(OPERATIONS[name]), splits=["before:3"], init="fresh", example_input=example
    )
    assert [node for node in hne.conversion.nodes if node.form is Form.BRANCHES] == []


@pytest.mark.parametrize("name", REFUSED)
def test_the_operation_runs_per_branch_with_a_reason(name: str) -> None:
    hne = treeify.hierarchicalize(
        Around(REFUSED[name]),
        splits=["before:3"],
        init="fresh",
        example_input=torch.zeros(1, 3, 6, 6),
    )
    fallbacks = [node for node in hne.conversion.nodes if node.form is Form.BRANCHES]
    assert fallbacks
    assert all(node.reason for node in fallbacks)


@pytest.mark.filterwarnings("ignore:input's size at dim=0")
@pytest.mark.parametrize(
    ("operation", "form"),
    [
        (nn.InstanceNorm1d(WIDTH), Form.BRANCHES),
        (nn.Dropout1d(), Form.BATCH),
        (Do(lambda x: F.dropout1d(x, 0.5, True)), Form.BATCH),
    ],
)
def test_rows_are_no_channels(operation: nn.Module, form: Form) -> None:
    """What torch takes for one image without a batch must not be packed as channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), operation)
    example = torch.zeros(1, 3, 6, 6)
    hne = treeify.hierarchicalize(model, ["0:3"], init="perturb", example_input=example)
    assert hne.conversion.nodes[-1].form is form
    assert treeify.verify(hne, torch.randn(3, 3, 6, 6)).worst <= 1
