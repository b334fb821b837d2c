"""Only the branches that leaves need are run, MACs are what fvcore counts, answers are timed."""

from collections.abc import Callable
from typing import Any

import model_classes
import pytest
import small
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import treeify
from treeify.errors import InputError
from treeify.evaluation import cost
from treeify.evaluation.cost import answer_seconds, base_cost, costs, count_macs, fvcore_macs
from treeify.models import cifar_resnet50, mobilenetv2_hne
from treeify.models.architecture import Architecture
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
@given(splits=trees())
def test_counted_macs_are_those_fvcore_sees_executed(splits: list[str]) -> None:
    assert_counts_equal(small.ensemble(splits))


class Prefix(nn.Module):
    """The first leaves of an ensemble, as fvcore takes a model."""

    def __init__(self, hne: treeify.HierarchicalEnsemble, leaves: int) -> None:
        super().__init__()
        self.hne, self.leaves = hne, leaves

    def forward(self, x: torch.Tensor) -> Any:
        return self.hne(x, leaves=self.leaves)


def assert_counts_equal(hne: treeify.HierarchicalEnsemble) -> None:
    """The ensemble's own MACs, those of its base model, and fvcore's, for every nested size."""
    x = hne.example_images(1)
    for size in hne.tree.nested_sizes:
        assert hne.count_macs(size) == fvcore_macs(Prefix(hne, size), x)
    assert hne.count_macs(1) == fvcore_macs(hne.leaf(0), x)
    try:
        assert hne.count_macs(1) == count_macs(hne.skeleton, hne.example)
    except InputError as error:  # two odd models look at values
        assert "meta tensors" in str(error)


def _marks(case: zoo.Case, shape: str) -> list[pytest.MarkDecorator]:
    is_short = case.name.startswith("odd-") and shape == "wide"
    return [pytest.mark.slow] * (shape in case.slow) + [pytest.mark.thorough] * (not is_short)


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        pytest.param(case, shape, id=f"{case}-{shape}", marks=_marks(case, shape))
        for case in zoo.cases(slow=None)
        for shape in case.shapes
    ],
)
def test_macs_equal_fvcores_to_the_last(case: zoo.Case, shape: str) -> None:
    hne = treeify.hierarchicalize(
        case.model(), case.splits(shape), init="copy", example_input=case.images(1)
    )
    assert_counts_equal(hne)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("build", "options", "splits"),
    [
        (cifar_resnet50, {}, ["block1", "block2", "block3", "block4"]),
        (cifar_resnet50, {"width": 0.5}, ["block1", "block2", "block3", "block4"]),
        (mobilenetv2_hne, {}, ["block2", "block3", "block4", "block5"]),
    ],
    ids=["HNE", "HNE_small", "MobileNetV2"],
)
def test_macs_of_the_papers_networks_equal_fvcores(
    build: Callable[..., nn.Module], options: dict[str, float], splits: list[str]
) -> None:
    assert_counts_equal(treeify.hierarchicalize(build(**options), splits, init="copy"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.network}-{case.name}", marks=[pytest.mark.thorough])
        for case in model_classes.CASES
    ],
)
def test_macs_of_a_model_of_every_class_equal_fvcores(case: model_classes.Case) -> None:
    base, shape = case.architecture.build(), (3, case.size, case.size)
    expected = fvcore_macs(base, torch.zeros(1, *shape))
    assert count_macs(base.to("meta"), shape) == expected


class Products(nn.Module):
    """Every kind of product that fvcore would not count or counts otherwise, on [N, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.recurrent = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.vector = nn.Parameter(torch.rand(10))
        self.matrix = nn.Parameter(torch.rand(6, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance_norm(self.norm(self.conv(x))).flatten(2)
        x, _ = self.recurrent(x.transpose(1, 2))
        x, _ = self.attention(x, x, x)
        x = x + (x @ self.vector)[..., None]
        return (
            torch.einsum("ntc,kc->nk", x, self.matrix)
            + (self.matrix @ x.mean(1)[..., None])[..., 0]
        )


def test_products_of_every_kind_are_counted() -> None:
    """By hand: 64 tokens of 4 and then of 10 channels, two heads of 5."""
    convolution, norm = 64 * 9 * 3 * 4, 64 * 4
    recurrent = 64 * 2 * 4 * 5 * (4 + 5)
    attention = 64 * 4 * 10 * 10 + 2 * 64 * 64 * 10
    vector = 64 * 10
    products = 2 * 6 * 10  # the tokens that einsum adds up it adds up first
    expected = convolution + norm + recurrent + attention + vector + products
    x = torch.zeros(1, 3, 8, 8)
    for frozen in (False, True):
        model = Products().requires_grad_(not frozen)
        assert fvcore_macs(model, x) == expected
        assert count_macs(model.to("meta"), (3, 8, 8)) == expected


def test_only_other_image_sizes_are_counted_by_fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    hne = small.ensemble()
    sizes: list[torch.Size] = []
    monkeypatch.setattr(cost, "fvcore_macs", lambda model, x: sizes.append(x.shape) or 7)
    assert [row.macs for row in costs(hne)] == [hne.count_macs(size) for size in (1, 3, 6)]
    assert costs(hne, small.images(1)) == costs(hne)
    assert base_cost(hne).macs == hne.count_macs(1)
    assert sizes == []
    assert [row.macs for row in costs(hne, torch.zeros(1, 3, 16, 16))] == [7, 7, 7]
    assert sizes == 3 * [(1, 3, 16, 16)]


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

    assert fvcore_macs(Attention(), torch.zeros(1, 2, size, 4)) == 2 * (2 * size * size * 4)


def test_frozen_batch_norms_stay_frozen() -> None:
    hne = small.ensemble().train()
    hne.get_submodule("stem.1").eval()
    model, on_meta = hne.leaf(0), hne.leaf(0).to("meta")
    for module, count in (
        (hne, lambda: costs(hne, torch.zeros(1, 3, 16, 16))),
        (model, lambda: fvcore_macs(model, small.images(1))),
        (on_meta, lambda: count_macs(on_meta, (3, 8, 8))),
    ):
        count()
        assert module.training
        assert not module.get_submodule("stem.1").training


def test_a_tree_without_splits_costs_one_model() -> None:
    assert Tree().nested_sizes == (1,)
    hne = small.ensemble([])
    assert costs(hne)[0].macs == base_cost(hne).macs


def test_every_nested_size_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.zeros(1, 3, 8, 8)
    base = Architecture("small:build", {"classes": 10})
    hne = treeify.hierarchicalize(
        base, ["stage1", "stage2:3"], init="fresh", example_input=example
    ).eval()
    sizes = []
    predict = treeify.HierarchicalEnsemble.predict

    def counting(self: treeify.HierarchicalEnsemble, x: torch.Tensor, leaves: int) -> object:
        sizes.append(leaves)
        return predict(self, x, leaves)

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "predict", counting)
    seconds = answer_seconds(hne, example, budget=0.0)
    assert list(seconds) == [1, 3, 6]
    assert all(time > 0 for time in seconds.values())
    # Once to warm up, and the three rounds that are measured whatever they take.
    assert sizes == [1, 3, 6] * 4
