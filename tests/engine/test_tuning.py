"""Tuning chooses what is fastest, remembers it, and leaves the ensemble as it was."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn

import treeify
from treeify.conversion.saving import save_measurements
from treeify.engine import timing
from treeify.engine.plan import Plan, Situation
from treeify.errors import InputError

Ensemble = treeify.HierarchicalEnsemble


def _named() -> Ensemble:
    return treeify.hierarchicalize(
        "small:build", ["stage1", "stage2:3"], example_input=small.EXAMPLE
    ).eval()


def _state(hne: Ensemble) -> dict[str, Tensor]:
    tensors = (*hne.named_parameters(), *hne.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Plan], float]], list[Plan]]:
    """Sets what running a plan takes, in seconds; returns the plans that were timed."""

    def install(seconds: Callable[[Plan], float]) -> list[Plan]:
        ran: list[Plan] = []
        timed: list[Plan] = []
        run = Ensemble.run

        def noted(self: Ensemble, x: Tensor, leaves: int, plan: Plan) -> Any:
            ran.append(plan)
            return run(self, x, leaves, plan)

        def time(action: Callable[[], Any], device: torch.device) -> float:
            action()
            timed.append(ran[-1])
            return seconds(ran[-1])

        monkeypatch.setattr(Ensemble, "run", noted)
        monkeypatch.setattr(timing, "timed", time)
        return timed

    return install


# One level at a time leads to any of these from the faster of all packed and all looped.
TARGETS = [
    Plan(("packed", *execution), channels_last)
    for execution in itertools.product(("packed", "looped"), repeat=2)
    for channels_last in (True, False)
]


def _distance(plan: Plan, target: Plan) -> float:
    """Seconds by how many levels, and whether the memory format, differ; level 0 has one branch."""
    levels = sum(a != b for a, b in zip(plan.execution[1:], target.execution[1:], strict=True))
    return 1 + levels + 5 * (plan.channels_last != target.channels_last)


@pytest.mark.parametrize(
    ("target", "training"), [*((target, False) for target in TARGETS), (TARGETS[2], True)]
)
def test_the_fastest_plan_is_found(target: Plan, training: bool, clock: Callable) -> None:
    hne, x = small.ensemble(), small.images()
    timed = clock(lambda plan: _distance(plan, target))
    tuning = hne.tune(x, training=training, repeats=2)
    assert _distance(tuning.plan, target) == 1
    assert tuning.plan.fuse is not training
    assert tuning.seconds[str(tuning.plan)] == min(tuning.seconds.values()) == 1
    assert set(tuning.seconds) == {str(plan) for plan in timed}
    assert all(tuning.seconds[str(plan)] == _distance(plan, target) for plan in timed)
    weight = hne.get_submodule("stage1.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is target.channels_last


def test_the_choice_is_kept_and_used(clock: Callable) -> None:
    hne, x = small.ensemble(), small.images()
    target = Plan(("packed", "packed", "looped"), channels_last=True)
    clock(lambda plan: _distance(plan, target))
    tuning = hne.tune(x, repeats=1)
    assert hne.tunings == {Situation.of(x, training=False): tuning}
    assert hne.plan(x) == tuning.plan
    assert hne.plan(small.images(64)) == tuning.plan
    other = hne.tune(x, training=True, repeats=1)
    assert set(hne.tunings) == {tuning.situation, other.situation}
    assert other.situation.training
    assert hne.tune(x, repeats=1) == tuning
    assert len(hne.tunings) == 2
    lines = str(tuning).splitlines()
    assert lines[0] == f"inference, 2x3x8x8 float32: {tuning.plan}"
    assert len(lines) == 1 + len(tuning.seconds)
    assert lines[1].split() == ["1000.00", "ms", *str(tuning.plan).split()]


def test_hopeless_plans_are_timed_once(clock: Callable) -> None:
    hne = small.ensemble()
    timed = clock(lambda plan: 1 + 99 * ("looped" in plan.execution))
    hne.tune(small.images(), repeats=4)
    looped = [plan for plan in timed if "looped" in plan.execution]
    assert len(looped) == len(set(looped))


def test_levels_that_only_seemed_faster_do_not_win(clock: Callable) -> None:
    """A mixed plan has a fast first round, and is slow ever after."""
    hne = small.ensemble()
    seen: list[Plan] = []

    def seconds(plan: Plan) -> float:
        seen.append(plan)
        if len(set(plan.execution[1:])) == 1:
            return 1.0 if plan.execution[1] == "packed" else 1.2
        return 0.9 if seen.count(plan) == 1 else 1.1

    clock(seconds)
    tuning = hne.tune(small.images(), repeats=1)
    assert tuning.plan.execution == ("packed",) * 3
    assert len(set(seen)) > 4  # the mixed ones were tried


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 1 + 4), (6.0, 1)])
def test_no_round_begins_after_the_budget_of_a_comparison(
    seconds: float, rounds: int, clock: Callable
) -> None:
    """Short calls warm up first; calls that are too long for that count at once."""
    hne = small.ensemble()
    timed = clock(lambda plan: seconds)
    hne.tune(small.images(), repeats=4, budget=10.0)
    comparisons = 2 + hne.tree.levels - 1
    assert len(timed) == comparisons * 2 * rounds


@pytest.mark.parametrize(("repeats", "wins"), [(1, False), (3, True)])
def test_few_rounds_have_to_show_a_larger_gain(repeats: int, wins: bool, clock: Callable) -> None:
    hne = small.ensemble()
    target = Plan(("packed", "packed", "looped"), channels_last=True)
    clock(
        lambda plan: (
            0.95 if plan.execution == target.execution else 1.0 + plan.execution.count("looped")
        )
    )
    assert (hne.tune(small.images(), repeats=repeats).plan.execution == target.execution) is wins


@pytest.mark.parametrize("training", [False, True, None])
def test_tuning_changes_nothing_else(training: bool | None) -> None:
    hne, x = small.ensemble().train(), small.images(3)
    hne(x).square().sum().backward()
    hne.get_submodule("stage1").eval()
    hne.get_submodule("head").requires_grad_(False)
    hne.get_submodule("stem.0").bias.grad = None
    x.requires_grad_(False)
    state, modes = _state(hne), [module.training for module in hne.modules()]
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in hne.named_parameters()}
    parameters = dict(hne.named_parameters())
    random_state, images = torch.get_rng_state(), x.clone()

    hne.tune(x, training=training, repeats=1)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, images)
    assert [module.training for module in hne.modules()] == modes
    after = _state(hne)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    for name, parameter in hne.named_parameters():
        assert parameter is parameters[name]
        before = gradients[name]
        assert (parameter.grad is None) == (before is None), name
        assert before is None or torch.equal(parameter.grad, before), name


def test_an_ensemble_whose_measurement_fails_is_as_it_was() -> None:
    hne, x = small.ensemble(), small.images()
    state = _state(hne)

    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        hne.tune(x, training=True, loss=broken)
    assert not hne.training
    assert hne.tunings == {}
    assert all(parameter.grad is None for parameter in hne.parameters())
    assert all(torch.equal(value, state[name]) for name, value in _state(hne).items())


def test_a_training_step_is_measured_with_the_given_loss() -> None:
    hne, x = small.ensemble(), small.images()
    seen: list[torch.Size] = []

    def loss(logits: Tensor) -> Tensor:
        assert hne.training
        assert logits.requires_grad
        seen.append(logits.shape)
        return logits.mean()

    hne.tune(x, training=True, loss=loss, repeats=1)
    assert set(seen) == {torch.Size((2, 6, small.CLASSES))}
    assert not hne.training


def test_models_with_several_outputs_can_be_tuned() -> None:
    class Two(small.SmallNet):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = super().forward(x)
            return logits, logits.softmax(-1)

    hne = treeify.hierarchicalize(Two(), ["stage1"], init="fresh", example_input=small.EXAMPLE)
    assert hne.tune(small.images(), training=True, repeats=1).situation.training


@pytest.mark.parametrize("images", [small.images(0), torch.zeros(2, 4, 8, 8)])
def test_images_that_cannot_be_measured(images: Tensor) -> None:
    hne = small.ensemble()
    with pytest.raises(InputError):
        hne.tune(images)
    assert hne.tunings == {}


def test_tuning_in_inference_mode_leaves_an_ensemble_that_trains() -> None:
    hne, x = small.ensemble(), small.images()
    with torch.inference_mode():
        hne.tune(x, repeats=1)
    hne.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in hne.parameters())


def test_dropout_in_evaluation_needs_no_random_state() -> None:
    hne = small.ensemble()
    hne.get_submodule("stage2.1").train()  # Monte Carlo dropout
    before = torch.get_rng_state()
    hne.tune(small.images(), repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in hne.modules() if isinstance(m, nn.Dropout)] == [True]


def test_measurements_are_saved_and_loaded(tmp_path: Path) -> None:
    hne, x = _named(), small.images()
    tuning = hne.tune(x, repeats=1)
    hne.execution = ("packed", "auto", "looped")
    treeify.save(hne, tmp_path / "hne")
    again = treeify.load(tmp_path / "hne", trust=True)
    assert again.tunings == {tuning.situation: tuning}
    assert again.execution == ("packed", "auto", "looped")
    assert again.plan(x) == hne.plan(x)

    more = again.tune(small.images(5), repeats=1)
    again.execution = "auto"
    weights = (tmp_path / "hne" / "model.safetensors").read_bytes()
    save_measurements(again, tmp_path / "hne")
    assert (tmp_path / "hne" / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in (tmp_path / "hne").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    third = treeify.load(tmp_path / "hne", trust=True)
    assert third.tunings == {tuning.situation: tuning, more.situation: more}
    assert third.execution == "auto"
    assert torch.equal(third(x), again(x))


def test_measurements_of_another_ensemble_are_refused(tmp_path: Path) -> None:
    treeify.save(_named(), tmp_path / "hne")
    other = small.ensemble(["stage1", "stage2"])
    before = (tmp_path / "hne" / "config.json").read_text()
    with pytest.raises(treeify.TreeifyError, match="holds another ensemble"):
        save_measurements(other, tmp_path / "hne")
    assert (tmp_path / "hne" / "config.json").read_text() == before
