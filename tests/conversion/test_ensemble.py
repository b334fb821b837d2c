"""An ensemble behaves like any module, and answers for any number of leaves."""

import copy
import io
import json

import pytest
import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.anytime.confidence import Budget
from treeify.anytime.session import Answer
from treeify.conversion.ensemble import MEASUREMENTS, Measurements
from treeify.errors import InputError, LeafError


def test_outputs_have_the_shapes_of_the_tree() -> None:
    hne = small.ensemble()
    x = small.images(4)
    assert hne.leaves == 6
    assert hne.tree.nested_sizes == (1, 3, 6)
    assert hne(x).shape == (4, 6, small.CLASSES)
    assert hne(x, leaves=4).shape == (4, 4, small.CLASSES)
    assert hne.predict(x, leaves=3).shape == (4, small.CLASSES)
    assert_close(hne.predict(x, leaves=3), hne(x)[:, :3].mean(1))


def test_every_number_of_leaves_is_a_prefix() -> None:
    hne = small.ensemble(["input", "stage1:3", "stage2"])
    x = small.images()
    for leaves in range(1, hne.leaves + 1):
        assert_close(hne(x, leaves=leaves), hne(x)[:, :leaves])


def test_no_splits_is_the_base_model() -> None:
    model = small.SmallNet().eval()
    hne = treeify.hierarchicalize(model, [], init="copy", example_input=small.EXAMPLE)
    x = small.images()
    assert hne.leaves == 1
    assert torch.equal(hne(x)[:, 0], model(x))


@pytest.mark.parametrize("leaves", [0, 7, 2.0])
def test_a_number_of_leaves_that_does_not_exist(leaves: object) -> None:
    with pytest.raises(LeafError, match="from 1 to 6"):
        small.ensemble()(small.images(), leaves=leaves)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8)])
def test_an_input_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"Expected images of shape \[N, 3, 8, 8\]"):
        small.ensemble()(torch.zeros(shape))


@pytest.mark.parametrize("leaves", [1, 3, 6])
def test_a_sub_ensemble_holds_what_its_leaves_need(leaves: int) -> None:
    hne = small.ensemble()
    x = small.images()
    smaller = hne.sub_ensemble(leaves)
    assert_close(smaller(x), hne(x, leaves=leaves))
    assert sum(p.numel() for p in smaller.parameters()) == hne.count_parameters(leaves)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert hne(x).abs().max() > 0


def test_leaves_that_form_no_tree() -> None:
    with pytest.raises(LeafError, match=r"nested sizes \(1, 3, 6\)"):
        small.ensemble().sub_ensemble(4)


def test_deepcopy_is_independent() -> None:
    hne = small.ensemble()
    x = small.images()
    before = hne(x)
    twin = copy.deepcopy(hne)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(hne(x), before)
    assert twin(x).abs().max() == 0


def test_dtype_memory_format_and_state_dict_round_trip() -> None:
    hne, x = small.ensemble(), small.images()
    before = hne(x)
    precise = copy.deepcopy(hne).double()
    assert precise(x.double()).dtype == torch.float64
    last = copy.deepcopy(hne).to(memory_format=torch.channels_last)
    weight = last.get_submodule("stage1.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(last(x.to(memory_format=torch.channels_last)), before)
    file = io.BytesIO()
    torch.save(hne.state_dict(), file)
    file.seek(0)
    other = small.ensemble(seed=9)
    assert not torch.equal(other(x), before)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), before)


def test_packed_modules_are_what_pytorch_knows() -> None:
    hne = small.ensemble()
    conv = hne.get_submodule("stage2.0")
    norm = hne.get_submodule("stage1.1")
    assert type(conv) is nn.Conv2d
    assert (conv.groups, conv.out_channels) == (6, 48)
    assert type(norm) is nn.BatchNorm2d
    assert norm.num_features == 16


def test_mixed_precision() -> None:
    hne, x = small.ensemble(), small.images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hne(x)
        network = hne.leaf(2)(x)
    assert logits.dtype == network.dtype == torch.bfloat16
    assert_close(logits[:, 2], network, rtol=0.05, atol=0.05)


# Part of a level computes with views of parameters, and the compiler looks for their .grad.
@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_equals_eager() -> None:
    hne, x = small.ensemble(), small.images()
    compiled = torch.compile(hne, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), hne(x))
    assert_close(torch.compile(hne, backend="aot_eager")(x, leaves=4), hne(x, leaves=4))
    hne.train()
    loss = compiled(x).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in hne.parameters())


def test_dropout_draws_a_mask_for_every_branch() -> None:
    hne = small.ensemble(init="copy").train()
    torch.manual_seed(0)
    logits = hne(small.images(8))
    assert logits.std(dim=1).min() > 0  # equal weights, different masks


def test_one_part_can_stay_in_evaluation_mode() -> None:
    hne = small.ensemble(init="copy").train()
    hne.get_submodule("stage2.1").eval()
    logits = hne(small.images(8))
    assert_close(logits[:, 0], logits[:, 5])  # no dropout, so copies agree


def test_names_that_the_ensemble_uses_itself() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tree = nn.Conv2d(3, 4, 3)
            self.leaf = nn.Conv2d(4, 4, 3)
            self.predict = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.predict(self.leaf(self.tree(x)).mean((2, 3)))

    model = Clash()
    hne = treeify.hierarchicalize(model, ["leaf"], init="fresh", example_input=small.EXAMPLE)
    assert treeify.verify(hne, small.images()).worst <= 1
    assert hne.state_dict().keys() == model.state_dict().keys()
    assert hne.tree.leaves == 2


@pytest.mark.parametrize("leaves", [None, 1, 4])
def test_predict_tells_an_observer_of_every_size_on_the_way(leaves: int | None) -> None:
    hne, x = small.ensemble(), small.images(3)
    answers: list[tuple[Answer, Tensor]] = []
    logits = hne.predict(x, leaves, observe=lambda *answer: answers.append(answer))
    last = hne.leaves if leaves is None else leaves
    sizes = [*(size for size in (1, 3) if size < last), last]
    assert [answer.leaves for answer, _ in answers] == sizes
    assert all(images.tolist() == [0, 1, 2] for _, images in answers)
    assert torch.equal(answers[-1][0].logits, logits)
    assert_close(logits, hne.predict(x, leaves))


def test_predict_tells_an_observer_which_images_took_part() -> None:
    hne, x = small.ensemble(), small.images(6)
    first = hne.predict(x, leaves=1).softmax(-1).amax(-1)
    threshold = first.sort().values[2:4].mean().item()
    answers: list[tuple[Answer, Tensor]] = []
    prediction = hne.predict(
        x,
        confidence=[threshold, 2.0],
        observe=lambda *answer: answers.append(answer),
    )
    assert torch.equal(prediction.logits, hne.predict(x, confidence=[threshold, 2.0]).logits)
    assert answers[0][1].tolist() == list(range(6))
    unsure = (first < threshold).nonzero().flatten()
    for answer, images in answers[1:]:
        assert torch.equal(images, unsure)
        assert len(answer.logits) == len(unsure)
    assert [answer.leaves for answer, _ in answers] == [1, 3, 6]


def test_predict_tells_an_observer_of_answers_by_a_deadline() -> None:
    hne, x = small.ensemble(), small.images(2)
    hne.calibrate(x, repeats=2)
    answers: list[tuple[Answer, Tensor]] = []
    prediction = hne.predict(x, deadline=60.0, observe=lambda *answer: answers.append(answer))
    assert [answer.leaves for answer, _ in answers] == [6]
    assert answers[0][1].tolist() == [0, 1]
    assert torch.equal(answers[0][0].logits, prediction.logits)


def measured() -> Measurements:
    hne, x = small.ensemble(), small.images()
    hne.execution = ["packed", "looped", "auto"]
    hne.tune(x, repeats=1, budget=0.0)
    hne.calibrate(x, repeats=2, budget=0.0)
    hne.budgets[7] = Budget(7, (1, 3, 6), (0.9, 0.8), 6.5, 0.75, (0.5, 0.25, 0.25), 4)
    return hne.measurements


def test_json_and_back() -> None:
    before = measured()
    text = json.dumps(MEASUREMENTS.dump_python(before, mode="json", by_alias=True))
    assert MEASUREMENTS.validate_python(json.loads(text)) == before
    assert list(json.loads(text)) == ["execution", "tunings", "latencies", "budgets"]


def test_an_ensemble_takes_over_what_another_measured() -> None:
    before, hne = measured(), small.ensemble()
    assert hne.measurements == Measurements()
    hne.measurements = before
    assert hne.measurements == before
    assert hne.execution == ("packed", "looped", "auto")
    (latencies,) = hne.latencies.values()
    assert hne.latencies[latencies.situation].sizes == (1, 3, 6)
    assert hne.budgets[7].thresholds == (0.9, 0.8)


def test_parameters_take_the_memory_format_that_was_tuned() -> None:
    before, hne = measured(), small.ensemble()
    (tuning,) = before.tunings
    hne.measurements = before
    weight = hne.get_submodule("stage1.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == tuning.plan.channels_last
