"""However levels run, packed, looped or both, it is the same computation."""

import copy
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.engine.forms import Branches, Form, unpack
from treeify.engine.program import Crossing, CrossingValue, Walk
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span

EXECUTIONS = ("packed", "looped")
FOUR_LEVELS = ["stem.1", "stage1:3", "stage2"]
EVERY_MIX = list(product(EXECUTIONS, repeat=4))


def _without_dropout(hne: treeify.HierarchicalEnsemble) -> treeify.HierarchicalEnsemble:
    for module in hne.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return hne


def _training_step(
    hne: treeify.HierarchicalEnsemble,
    x: Tensor,
    execution: str | Sequence[str],
    leaves: int | None = None,
) -> dict[str, Tensor]:
    """Logits, gradients and buffers of a step on a copy."""
    hne = copy.deepcopy(hne).train()
    hne.execution = execution
    logits = hne(x, leaves=leaves)
    weights = torch.arange(logits.numel(), dtype=logits.dtype).reshape(logits.shape).cos()
    (logits * weights).sum().backward()
    gradients = {
        f"gradient {name}": parameter.grad
        for name, parameter in hne.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), **gradients, **dict(hne.named_buffers())}


class Grouped(nn.Module):
    """Grouped, depthwise and plain convolutions and linear layers right after splits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.slope = nn.PReLU(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.norm(self.depthwise(self.grouped(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def _grouped() -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    splits = ["grouped:3", "depthwise", "head"]
    return treeify.hierarchicalize(
        Grouped(), splits, init="perturb", example_input=small.EXAMPLE
    ).eval()


@torch.no_grad()
def test_every_mix_of_ways_gives_the_same_logits() -> None:
    hne, x = small.ensemble(FOUR_LEVELS).double(), small.images().double()
    expected = hne(x)
    for execution in EVERY_MIX:
        hne.execution = execution
        assert_close(hne(x), expected, msg=str(execution))
        for leaves in (1, 5, 7, 11):
            assert_close(hne(x, leaves=leaves), expected[:, :leaves], msg=f"{execution} {leaves}")


@pytest.mark.parametrize("leaves", [None, 7])
def test_every_mix_of_ways_trains_the_same(leaves: int | None) -> None:
    hne = _without_dropout(small.ensemble(FOUR_LEVELS)).double()
    x = small.images(3).double()
    expected = _training_step(hne, x, "packed", leaves)
    for execution in EVERY_MIX:
        state = _training_step(hne, x, execution, leaves)
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(state[key], value, msg=f"{execution} {key}")


@pytest.mark.parametrize("leaves", [1, 5, 8, 11, 12])
def test_groups_after_splits_train_the_same_looped(leaves: int) -> None:
    hne, x = _grouped().double(), small.images(3).double()
    expected = _training_step(hne, x, "packed", leaves)
    for execution in (("looped",) * 4, ("packed", "looped", "packed", "looped")):
        state = _training_step(hne, x, execution, leaves)
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(state[key], value, msg=f"{execution} {key}")


def test_looped_training_equals_separate_networks() -> None:
    hne = _grouped()
    hne.execution = "looped"
    assert treeify.verify(hne, small.images(3)).worst <= 1


def test_looped_dropout_draws_a_mask_for_every_branch() -> None:
    hne = small.ensemble(init="copy").train()
    hne.execution = "looped"
    torch.manual_seed(0)
    logits = hne(small.images(8))
    for one, other in ((0, 1), (0, 3), (2, 5)):
        assert not torch.equal(logits[:, one], logits[:, other])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_options_of_a_packed_module_hold_however_it_runs(execution: str) -> None:
    hne = _without_dropout(small.ensemble()).train()
    norm = hne.get_submodule("stage1.1")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 1.0
    norm.eps = 0.5
    reference = hne.leaf(0)
    reference.stage2[1].p = 0.0
    reference.stage1[1].momentum, reference.stage1[1].eps = 1.0, 0.5
    hne.execution = execution
    x = small.images(4)
    assert_close(hne(x)[:, 0], reference(x))
    assert_close(norm.running_mean[:8], reference.stage1[1].running_mean)


def test_a_frozen_norm_stays_frozen_looped() -> None:
    hne = _without_dropout(small.ensemble()).train()
    norm = hne.get_submodule("stage1.1").eval()
    before = norm.running_mean.clone()
    x = small.images(4)
    expected = hne(x)
    hne.execution = "looped"
    assert_close(hne(x), expected)
    assert torch.equal(norm.running_mean, before)


def test_frozen_parameters_get_no_gradient_looped() -> None:
    hne = small.ensemble().train()
    hne.get_submodule("stage1").requires_grad_(False)
    hne.execution = "looped"
    hne(small.images()).sum().backward()
    graded = {name for name, parameter in hne.named_parameters() if parameter.grad is not None}
    assert graded == {n for n, _ in hne.named_parameters() if not n.startswith("stage1")}


@pytest.mark.thorough
# Part of a level computes with views of parameters, and the compiler looks for their .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_looped_compiles() -> None:
    hne, x = _without_dropout(small.ensemble()), small.images()
    hne.execution = ("packed", "packed", "looped")
    compiled = torch.compile(hne, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), hne(x))
    hne.train()
    compiled(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in hne.parameters())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_images_give_no_logits(execution: str) -> None:
    hne = small.ensemble()
    hne.execution = execution
    assert hne(small.images(0)).shape == (0, 6, small.CLASSES)


def test_buffers_shared_by_levels_train_packed() -> None:
    class Shared(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem[1](self.stage1(self.stem(x)))
            return self.head(self.stage2(x).mean((2, 3)))

    hne = treeify.hierarchicalize(
        Shared(), ["stage1", "stage2"], init="fresh", example_input=small.EXAMPLE
    )
    hne.execution = "looped"
    x = small.images()
    assert hne.shared_buffers
    assert hne.train().plan(x).execution == ("packed",) * 3
    assert hne.eval().plan(x).execution == ("looped",) * 3


def test_consecutive_looped_levels_are_walked_depth_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hne = small.ensemble(["stem", "stage1", "stage2"])
    calls: list[tuple[int, int]] = []
    call = Walk.call

    def recorded(walk: Walk, level: int, span: Span, values: dict[str, CrossingValue]) -> Any:
        calls.append((level, span.start))
        return call(walk, level, span, values)

    monkeypatch.setattr(Walk, "call", recorded)
    hne.execution = ["packed", "looped", "looped", "packed"]
    hne(small.images())
    assert calls == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3), (3, 0)]


def test_images_leave_stacked_values() -> None:
    facts = TensorFacts((2,), batched=True, batch_dim=0)
    stacked = torch.arange(12.0).view(3, 4)  # 3 branches, one number for each of 4 images
    value = CrossingValue(Crossing(1, Form.PACKED, facts, rows=True), Span(0, 3), stacked)
    assert_close(value.select(torch.tensor([1, 3])).value, stacked[:, [1, 3]])


def _crossing_value(form: Form) -> tuple[CrossingValue, Tensor]:
    """Features of three branches in some form, and as they are per branch, `[G, N, C, H, W]`."""
    facts = TensorFacts((2, 4, 3, 3), batched=True, batch_dim=0)
    branches = torch.arange(3 * 2 * 4 * 9.0).view(3, 2, 4, 3, 3)
    values = {
        Form.PACKED: branches.transpose(0, 1).flatten(1, 2),
        Form.BATCH: branches.flatten(0, 1),
        Form.BRANCHES: Branches(branches),
    }
    return CrossingValue(Crossing(1, form, facts, rows=True), Span(4, 7), values[form]), branches


@pytest.mark.parametrize("form", [Form.PACKED, Form.BATCH, Form.BRANCHES])
def test_values_are_sliced_by_branches(form: Form) -> None:
    value, branches = _crossing_value(form)
    facts = value.crossing.facts
    for span in (Span(4, 5), Span(6, 7), Span(5, 7), Span(4, 7)):
        sliced = value.slice(span)
        if form is not Form.BRANCHES:
            sliced = unpack(sliced, facts, span.size, form)
        assert_close(torch.stack(sliced), branches[span.start - 4 : span.stop - 4])


@pytest.mark.parametrize("form", [Form.PACKED, Form.BATCH, Form.BRANCHES])
def test_one_branch_of_a_value_has_memory_of_its_own(form: Form) -> None:
    value, branches = _crossing_value(form)
    alone = value.branch(5)
    (tensor,) = alone.tensors()
    assert alone.span == Span(5, 6)
    assert_close(tensor, branches[1])
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("form", [Form.PACKED, Form.BATCH, Form.BRANCHES])
def test_images_leave_values_in_every_form(form: Form) -> None:
    value, branches = _crossing_value(form)
    selected = value.select(torch.tensor([1])).value
    if form is not Form.BRANCHES:
        selected = unpack(selected, value.crossing.facts, 3, form)
    assert_close(torch.stack(selected), branches[:, 1:])
