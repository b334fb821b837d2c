"""Gains over one leaf, their error, and how often leaves differ: against the explicit formulas."""

from itertools import combinations

import pytest
import small
import torch

from treeify.errors import DataError, InputError
from treeify.evaluation.classes import NamedClasses
from treeify.evaluation.comparison import Gain, Gains, base_model_of, compare, is_leaf, verdict
from treeify.tree import Tree

TREE = Tree((2, 3))


def test_totals_over_batches_equal_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, 4, generator=generator)
    target = torch.randint(4, (50,), generator=generator)
    gains = Gains(TREE)
    for part in (slice(0, 20), slice(20, 50)):
        gains.add(logits[part], target[part])
    one = (logits[:, 0].argmax(-1) == target).double()
    classes = logits.argmax(-1)
    for row, size in zip(gains.result(), TREE.nested_sizes, strict=True):
        change = (logits[:, :size].mean(1).argmax(-1) == target).double() - one
        assert row.gain == pytest.approx(100 * change.mean().item())
        assert row.error == pytest.approx(100 * (change.std(correction=0) / 50**0.5).item())
        pairs = [(classes[:, a] != classes[:, b]) for a, b in combinations(range(size), 2)]
        expected = torch.stack(pairs).double().mean().item() if pairs else 0.0
        assert row.disagreement == pytest.approx(100 * expected)


def test_there_is_nothing_to_compare_without_images() -> None:
    with pytest.raises(DataError, match="no images"):
        Gains(TREE).result()


def test_one_pass_scores_the_ensemble_and_the_base_model() -> None:
    hne = small.ensemble().train()
    base = base_model_of(hne, None)
    assert is_leaf(base, hne)
    assert not is_leaf(base, hne, 5)
    batches = [(small.images(4), torch.tensor([0, 1, 2, 3]))]
    scores, gains, score = compare(hne, batches, base)
    assert hne.training
    assert score is not None
    assert score.accuracy == scores.result()[0].accuracy
    assert score.nll == pytest.approx(scores.result()[0].nll, rel=1e-4)
    assert gains.images == scores.images == 4
    assert compare(hne, batches)[2] is None


def test_an_observer_is_called_with_what_is_counted() -> None:
    hne = small.ensemble()
    named = NamedClasses(hne.tree, small.CLASSES)
    target = torch.tensor([0, 1, 2, 3, 3])
    batches = [(small.images(3), target[:3]), (small.images(2), target[3:])]
    scores, *_ = compare(hne, batches, observe=named.add_batch)
    assert torch.equal(named.labels, target)
    correct = named.confusion().diagonal().sum()
    assert scores.result()[-1].accuracy == pytest.approx(100 * correct.item() / 5)
    with pytest.raises(InputError, match="observe"):
        compare(hne, batches, observe="print")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gain", "part"),
    [
        (Gain(4, 0.3, 0.2, 5.0), "+0.30 points of accuracy, within the noise of 400 images"),
        (Gain(4, 1.0, 0.2, 1.0), "+1.00 points of accuracy, as they agree: "),
        (Gain(4, 1.0, 0.2, 5.0), None),
        (Gain(1, 0.0, 0.0, 0.0), None),
    ],
)
def test_leaves_are_worth_it_if_they_gain_and_differ(gain: Gain, part: str | None) -> None:
    sentence = verdict(gain, 4.17, 10.0, 400)
    if part is None:
        assert sentence is None
    else:
        assert sentence is not None
        assert f"4 leaves cost 4.17 times the MACs of one for {part}" in sentence
        assert sentence.endswith("branches.") == (gain.disagreement < 2.5)
