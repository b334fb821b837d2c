"""Images leave the batch when they are sure, and budgets are kept on average."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.anytime.confidence import BUDGET, budget, confidence
from treeify.anytime.session import Session
from treeify.errors import InputError

Ensemble = treeify.HierarchicalEnsemble


def _ensemble(scale: float = 12.0) -> Ensemble:
    """Its logits are far enough apart for confidences to spread between 0.2 and 1."""
    hne = small.ensemble(init="fresh")
    with torch.no_grad():
        hne.get_submodule("head").weight.mul_(scale)
    return hne


def _at_every_size(hne: Ensemble, x: Tensor) -> Tensor:
    """Logits of full calls, [S, N, K]."""
    with torch.no_grad():
        return torch.stack([hne.predict(x, leaves=size) for size in hne.tree.nested_sizes])


def _oracle(
    sizes: Sequence[int], logits: Tensor, thresholds: Sequence[float]
) -> tuple[Tensor, list[int]]:
    """Image by image: the first size whose highest probability reaches its threshold."""
    answers, used = [], []
    for image in range(logits.shape[1]):
        for index, size in enumerate(sizes):
            sure = index == len(sizes) - 1 or (
                logits[index, image].softmax(-1).max().item() >= thresholds[index]
            )
            if sure:
                answers.append(logits[index, image])
                used.append(size)
                break
    return torch.stack(answers), used


def _middle(values: Tensor, share: float) -> float:
    """A threshold half-way between two of the values, so that rounding decides nothing."""
    ordered = values.sort().values
    index = min(int(share * (len(ordered) - 1)), len(ordered) - 2)
    return ((ordered[index] + ordered[index + 1]) / 2).item()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Filled with the size and the images of every step."""
    steps: list[tuple[int, int]] = []
    compute = Session._compute

    def noted(self: Session, to: int) -> None:
        compute(self, to)
        steps.append((to, self._leaf_logits.shape[0]))

    monkeypatch.setattr(Session, "_compute", noted)
    return steps


@pytest.mark.parametrize("execution", ["packed", "looped"])
@settings(max_examples=5)
@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_answers_are_those_of_the_first_sure_size(execution: str, shares: list[float]) -> None:
    hne, x = _ensemble(), small.images(12)
    hne.execution = execution
    logits = _at_every_size(hne, x)
    thresholds = [_middle(confidence(logits[index]), share) for index, share in enumerate(shares)]
    expected, used = _oracle(hne.tree.nested_sizes, logits, thresholds)
    answer = hne.predict(x, confidence=thresholds)
    assert answer.leaves.tolist() == used
    assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)
    assert not answer.logits.requires_grad


def test_sure_images_leave_the_batch(rows: list[tuple[int, int]]) -> None:
    hne, x = _ensemble(), small.images(12)
    logits = _at_every_size(hne, x)
    threshold = _middle(confidence(logits[0]), 0.5)
    _, used = _oracle(hne.tree.nested_sizes, logits, [threshold] * 2)
    assert len(set(used)) > 1
    hne.predict(x, confidence=threshold)
    expected = [(size, sum(leaves >= size for leaves in used)) for size in hne.tree.nested_sizes]
    assert rows == [row for row in expected if row[1]]


class Gated(small.SmallNet):
    """A number for each image, times a branch's own, goes past a split."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(12.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        strength = x.mean((1, 2, 3)) * self.gate
        x = self.stage2(x)
        return self.head(x.mean((2, 3))) * (strength * x.mean((1, 2, 3)).exp())[:, None]


def test_numbers_of_images_leave_with_them() -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Gated(), ["stage1", "stage2:3"], init="perturb", example_input=small.EXAMPLE
    ).eval()
    x = small.images(12)
    logits = _at_every_size(hne, x)
    thresholds = [_middle(confidence(logits[index]), 0.5) for index in range(2)]
    expected, used = _oracle(hne.tree.nested_sizes, logits, thresholds)
    assert len(set(used)) > 1
    answer = hne.predict(x, confidence=thresholds)
    assert answer.leaves.tolist() == used
    assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_no_threshold_and_one_nobody_reaches(rows: list[tuple[int, int]]) -> None:
    hne, x = _ensemble(), small.images(4)
    logits = _at_every_size(hne, x)
    first, last = hne.predict(x, confidence=0), hne.predict(x, confidence=1.5)
    assert rows == [(1, 4), (1, 4), (3, 4), (6, 4)]
    assert first.leaves.tolist() == [1] * 4
    assert last.leaves.tolist() == [6] * 4
    assert_close(first.logits, logits[0])
    assert_close(last.logits, logits[-1])
    middle = hne.predict(x, confidence=(2.0, 0.0))
    assert middle.leaves.tolist() == [3] * 4
    assert_close(middle.logits, logits[1])


def test_a_threshold_that_is_met_exactly_suffices() -> None:
    hne, x = small.ensemble(), small.images(3)
    with torch.no_grad():
        for parameter in hne.get_submodule("head").parameters():
            parameter.zero_()  # every class has probability 0.2
    exact = confidence(torch.zeros(1, small.CLASSES)).item()
    assert hne.predict(x, confidence=exact).leaves.tolist() == [1] * 3
    assert hne.predict(x, confidence=exact + 1e-3).leaves.tolist() == [6] * 3


def test_one_image_no_images_and_no_splits() -> None:
    hne = _ensemble()
    assert hne.predict(small.images(1), confidence=2.0).leaves.tolist() == [6]
    none = hne.predict(small.images(0), confidence=0.5)
    assert none.logits.shape == (0, small.CLASSES)
    assert none.leaves.shape == (0,)
    base = small.ensemble([])
    assert base.predict(small.images(2), confidence=0.5).leaves.tolist() == [1, 1]
    assert base.predict(small.images(2), confidence=()).leaves.tolist() == [1, 1]


def test_images_without_an_answer_get_all_leaves() -> None:
    hne, x = _ensemble(), small.images(3)
    x[1] = float("nan")
    answer = hne.predict(x, confidence=0.0)
    assert answer.leaves.tolist() == [1, 6, 1]
    assert answer.logits.isnan().any(1).tolist() == [False, True, False]


class CountsImages(small.SmallNet):
    """The batch size crosses a split, so that images cannot leave."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        count = x.shape[0]
        x = self.stage2(self.stage1(x).reshape(count, 8, 8, 8))
        return self.head(30 * x.mean((2, 3)))


def test_images_that_cannot_leave_are_answered_the_same(rows: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        CountsImages(), ["stage1", "stage2:3"], init="fresh", example_input=small.EXAMPLE
    ).eval()
    x = small.images(12)
    logits = _at_every_size(hne, x)
    threshold = _middle(confidence(logits[0]), 0.5)
    expected, used = _oracle(hne.tree.nested_sizes, logits, [threshold] * 2)
    assert len(set(used)) > 1
    answer = hne.predict(x, confidence=threshold)
    assert answer.leaves.tolist() == used
    assert_close(answer.logits, expected, rtol=1e-4, atol=1e-5)
    assert {count for _, count in rows} == {12}


@pytest.mark.parametrize(
    "threshold", [-0.1, float("nan"), (0.5,), (0.5, 0.5, 0.5), (0.5, -1.0), ()]
)
def test_thresholds_that_fit_no_ensemble(threshold: object) -> None:
    with pytest.raises(InputError, match="fits no ensemble of 6 leaves"):
        small.ensemble().predict(small.images(), confidence=threshold)  # type: ignore[call-overload]


def test_confidence_needs_logits_and_evaluation_mode() -> None:
    class Two(small.SmallNet):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = super().forward(x)
            return logits, logits

    hne = treeify.hierarchicalize(
        Two(), ["stage1"], init="fresh", example_input=small.EXAMPLE
    ).eval()
    with pytest.raises(InputError, match="one tensor of logits"):
        hne.predict(small.images(), confidence=0.5)
    with pytest.raises(InputError, match=r"hne\.eval"):
        small.ensemble().train().predict(small.images(), confidence=0.5)
    with pytest.raises(InputError, match="several limits"):
        small.ensemble().predict(small.images(), 3, confidence=0.5)  # type: ignore[call-overload]


SIZES, MACS = (1, 2, 4, 8), (53_000_001, 68_000_003, 110_000_007, 207_000_009)


def _held_out(images: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that get surer and better with every size, [4, images, 10], and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (images,), generator=generator)
    signal = 2 * nn.functional.one_hot(labels, 10)
    noise = torch.randn(4, images, 10, generator=generator)
    strength = torch.tensor([1.0, 1.3, 1.6, 2.0])[:, None, None]
    return strength * signal + 1.5 * noise, labels


@settings(max_examples=30)
@given(st.integers(MACS[0], MACS[-1]), st.integers(1, 300))
def test_the_mean_cost_is_the_target(target: int, images: int) -> None:
    logits, labels = _held_out(images)
    chosen = budget(logits, labels, SIZES, MACS, target)
    # Every size's fraction is rounded to whole images.
    assert abs(chosen.macs - target) <= (MACS[-1] - MACS[0]) / images
    assert sum(chosen.fractions) == pytest.approx(1)
    assert chosen.macs == pytest.approx(
        sum(fraction * macs for fraction, macs in zip(chosen.fractions, MACS, strict=True)),
        rel=1e-12,
    )
    assert (chosen.target_macs, chosen.sizes, chosen.images) == (target, SIZES, images)
    assert len(chosen.thresholds) == 3
    assert BUDGET.validate_json(BUDGET.dump_json(chosen, by_alias=True)) == chosen


def test_a_budget_is_what_its_thresholds_give() -> None:
    logits, labels = _held_out()
    for target in (60_000_000, 100_000_000, 180_000_000):
        chosen = budget(logits, labels, SIZES, MACS, target)
        answers, used = _oracle(SIZES, logits.double(), chosen.thresholds)
        assert chosen.accuracy == (answers.argmax(-1) == labels).double().mean().item()
        assert chosen.fractions == pytest.approx([used.count(size) / len(used) for size in SIZES])
        spent = sum(MACS[SIZES.index(size)] for size in used) / len(used)
        assert chosen.macs == pytest.approx(spent, rel=1e-12)


def test_more_to_spend_is_never_less_spent() -> None:
    logits, labels = _held_out()
    targets = torch.linspace(MACS[0], MACS[-1], 40).long().clamp(MACS[0], MACS[-1]).tolist()
    budgets = [budget(logits, labels, SIZES, MACS, target) for target in targets]
    spent = [chosen.macs for chosen in budgets]
    # A fraction may round to one image less, whose cost is at most the largest between sizes.
    slack = (MACS[-1] - MACS[0]) / len(labels)
    assert all(more >= less - slack for less, more in pairwise(spent))
    assert spent[-1] - spent[0] > 0.9 * (MACS[-1] - MACS[0])
    assert budgets[-1].accuracy > budgets[0].accuracy


def test_the_ends_of_the_range() -> None:
    logits, labels = _held_out()
    least = budget(logits, labels, SIZES, MACS, MACS[0])
    most = budget(logits, labels, SIZES, MACS, MACS[-1])
    assert (least.macs, least.fractions) == (MACS[0], (1, 0, 0, 0))
    assert (most.macs, most.fractions) == (MACS[-1], (0, 0, 0, 1))
    assert least.accuracy == (logits[0].argmax(-1) == labels).double().mean().item()
    assert most.accuracy == (logits[-1].argmax(-1) == labels).double().mean().item()
    alone = budget(logits[:1], labels, (1,), MACS[:1], MACS[0])
    assert (alone.thresholds, alone.macs) == ((), MACS[0])


@pytest.mark.parametrize("target", [0, MACS[0] - 1, MACS[-1] + 1, float("nan")])
def test_targets_that_cannot_be_kept(target: float) -> None:
    logits, labels = _held_out(5)
    with pytest.raises(InputError, match=r"53,000,001 \(1 leaf\) to 207,000,009 \(8 leaves\)"):
        budget(logits, labels, SIZES, MACS, target)  # type: ignore[arg-type]


def test_a_budget_needs_images() -> None:
    logits, labels = _held_out(5)
    with pytest.raises(InputError, match="no held-out images"):
        budget(logits[:, :0], labels[:0], SIZES, MACS, MACS[1])


def test_equal_confidences_stop_together() -> None:
    logits = torch.zeros(2, 100, 10)
    logits[:, :50, 0] = 1.0  # two groups of equally sure images
    labels = torch.zeros(100, dtype=torch.long)
    chosen = budget(logits, labels, (1, 2), (10, 20), 18)  # a fifth should stop
    assert chosen.fractions == (0.5, 0.5)
    assert chosen.macs == 15
    assert chosen.accuracy == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_predicting_the_held_out_images_spends_the_budget(seed: int) -> None:
    hne, x = _ensemble(), small.images(256, seed)
    labels = torch.arange(256) % small.CLASSES
    sizes = hne.tree.nested_sizes
    macs = [hne.count_macs(size) for size in sizes]
    logits = _at_every_size(hne, x)
    for fraction in (0.0, 0.2, 0.5, 0.8, 1.0):
        target = round(macs[0] + fraction * (macs[-1] - macs[0]))
        chosen = budget(logits, labels, sizes, macs, target)
        answer = hne.predict(x, confidence=chosen)
        spent = sum(hne.count_macs(leaves) for leaves in answer.leaves.tolist()) / len(x)
        assert spent == pytest.approx(chosen.macs, rel=1e-12)
        right = (answer.logits.argmax(-1) == labels).double().mean().item()
        assert right == chosen.accuracy


def test_a_budget_of_another_tree_is_refused() -> None:
    hne, x = small.ensemble(), small.images()
    logits, labels = _held_out(5)
    for sizes in ((1, 2), (1, 2, 6), SIZES):
        other = budget(logits[: len(sizes)], labels, sizes, MACS[: len(sizes)], MACS[1])
        with pytest.raises(InputError, match="another tree"):
            hne.predict(x, confidence=other)


def test_budgets_are_saved_and_loaded(tmp_path: Path) -> None:
    hne, x = _ensemble(), small.images(16)
    sizes = hne.tree.nested_sizes
    macs = [hne.count_macs(size) for size in sizes]
    chosen = budget(_at_every_size(hne, x), torch.arange(16) % 5, sizes, macs, macs[1])
    hne.budgets[chosen.target_macs] = chosen
    treeify.save(hne, tmp_path / "hne")
    again = treeify.load(tmp_path / "hne", model=small.SmallNet())
    assert again.budgets == {macs[1]: chosen}
    one, other = hne.predict(x, confidence=chosen), again.predict(x, confidence=chosen)
    assert torch.equal(one.leaves, other.leaves)
    assert_close(one.logits, other.logits)
