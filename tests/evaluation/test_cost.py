"""Only the branches that the leaves need are run, and MACs agree with fvcore on what ran."""

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import treeify
from treeify.evaluation.cost import base_cost, costs, macs
from treeify.rules.operations.widened import Widened
from treeify.tree import Span, Tree

STAGES = ("input", "stage1", "stage2", "head")


@st.composite
def trees(draw: st.DrawFn) -> list[str]:
    stages = draw(st.lists(st.sampled_from(STAGES), unique=True, min_size=1, max_size=3))
    return [f"{stage}:{draw(st.integers(2, 3))}" for stage in sorted(stages, key=STAGES.index)]


def _branches_that_ran(
    hne: treeify.HierarchicalEnsemble, x: torch.Tensor, leaves: Span
) -> dict[int, set[int]]:
    """Run a range of leaves and note which branches of which level any packed layer computed."""
    ran: dict[int, set[int]] = {}
    handles = []
    for segment in hne._programs[False].segments:
        for operation in segment.module.modules():
            if isinstance(operation, Widened):

                def note(_: nn.Module, args: tuple, level: int = segment.level) -> None:
                    ran.setdefault(level, set()).update(range(*args[0]))

                handles.append(operation.register_forward_pre_hook(note))
    hne._programs[False].run(x, leaves)
    for handle in handles:
        handle.remove()
    return ran


@settings(max_examples=15, deadline=None, derandomize=True)
@given(splits=trees(), data=st.data())
def test_the_branches_run_are_those_the_leaves_need(splits: list[str], data: st.DataObject) -> None:
    hne = small.ensemble(splits)
    start = data.draw(st.integers(0, hne.leaves - 1))
    stop = data.draw(st.integers(start + 1, hne.leaves))
    x = small.images(1)
    with torch.no_grad():
        ran = _branches_that_ran(hne, x, Span(start, stop))
        part = hne._programs[False].run(x, Span(start, stop))
        torch.testing.assert_close(part, hne(x)[:, start:stop])
    for level, branches in ran.items():
        needed = {hne.tree.path(leaf)[level] for leaf in range(start, stop)}
        assert branches == needed


@settings(max_examples=15, deadline=None, derandomize=True)
@given(splits=trees(), data=st.data())
def test_counted_macs_are_those_fvcore_sees_executed(
    splits: list[str], data: st.DataObject
) -> None:
    hne = small.ensemble(splits)
    leaves = data.draw(st.integers(1, hne.leaves))

    class Prefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hne = hne

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.hne(x, leaves=leaves)

    assert macs(Prefix(), small.images(1)) == hne.count_macs(leaves)


def test_costs_of_nested_sizes() -> None:
    hne = small.ensemble()
    rows = costs(hne)
    base = base_cost(hne)
    assert [row.leaves for row in rows] == [1, 3, 6]
    assert (rows[0].macs, rows[0].parameters) == (base.macs, base.parameters)
    assert rows[-1].parameters == sum(parameter.numel() for parameter in hne.parameters())
    assert rows[-1].macs < 6 * base.macs
    # By hand: 3x3 convolutions on 8x8 pixels, batch norms and a linear layer, times the branches.
    stem, conv, norm, head = 64 * 9 * 3 * 8, 64 * 9 * 8 * 8, 2 * 64 * 8, 8 * small.CLASSES
    assert rows[-1].macs == stem + norm + 2 * (conv + norm) + 6 * (conv + head)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_attention_is_counted(size: int) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert macs(Attention(), torch.zeros(1, 2, size, 4)) == 2 * (2 * size * size * 4)


def test_the_mode_comes_back() -> None:
    hne = small.ensemble().train()
    hne.get_submodule("stem.0").eval()
    costs(hne)
    assert hne.training
    assert not hne.get_submodule("stem.0").training


def test_a_tree_without_splits_costs_one_model() -> None:
    assert Tree().nested_sizes == (1,)
    hne = small.ensemble([])
    assert costs(hne)[0].macs == base_cost(hne).macs
