"""Running totals of every nested size, against the formulas spelled out."""

import math

import fusing
import pytest
import small
import torch
from torch.nn import functional as F

from treeify.errors import DataError, InputError
from treeify.evaluation.metrics import Score, Scores, measure, require_labels
from treeify.fusion.prepared_weights import Prepared
from treeify.tree import Tree

TREE = Tree((2, 3))


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(count, TREE.leaves, 4, generator=generator)
    return logits, torch.randint(4, (count,), generator=generator)


def scored(logits: torch.Tensor, target: torch.Tensor, tree: Tree = TREE) -> tuple[Score, ...]:
    scores = Scores(tree)
    scores.add(logits, target)
    return scores.result()


def test_each_size_is_scored_by_its_own_mean_logits() -> None:
    logits, target = examples(50)
    for image in range(50):
        alone = slice(image, image + 1)
        for score, leaves in zip(scored(logits[alone], target[alone]), (1, 3, 6), strict=True):
            mean = logits[alone, :leaves].mean(1)
            assert score.accuracy == 100 * (mean.argmax(1) == target[alone]).double().item()
            assert score.nll == pytest.approx(F.cross_entropy(mean, target[alone]).item())


def test_leaves_that_disagree_have_a_deviation() -> None:
    """Of each class's logits over the leaves, averaged over classes and images: by hand."""
    logits = torch.zeros(2, 2, 2)  # two images, two leaves, two classes
    logits[0] = torch.tensor([[1.0, 5.0], [3.0, 5.0]])  # deviations 1 and 0
    logits[1] = torch.tensor([[0.0, -2.0], [0.0, 4.0]])  # 0 and 3
    target, tree = torch.tensor([0, 1]), Tree((2,))
    for part, expected in ((slice(0, 1), 0.5), (slice(1, 2), 1.5), (slice(0, 2), 1.0)):
        scores = scored(logits[part], target[part], tree)
        assert [score.logit_std for score in scores] == [0.0, expected]


def test_the_deviation_is_that_of_the_standard() -> None:
    """Over more than two leaves, where it is no mean of distances."""
    logits, target = examples(50)
    for score in scored(logits, target):
        expected = logits[:, : score.leaves].std(1, correction=0).mean().item()
        assert score.logit_std == pytest.approx(expected, rel=1e-5)


def test_calibration_error_is_the_gap_in_fifteen_bins() -> None:
    logits, target = examples(200)
    scores = Scores(TREE)
    for part in (slice(0, 90), slice(90, 200)):
        scores.add(3 * logits[part], target[part])
    for score in scores.result():
        bins: dict[int, list[tuple[float, bool]]] = {}
        for image, label in zip((3 * logits[:, : score.leaves]).mean(1), target, strict=True):
            chances = image.softmax(0).tolist()
            confidence = max(chances)
            right = chances.index(confidence) == int(label)
            bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, right))
        gaps = (abs(sum(c for c, _ in own) - sum(r for _, r in own)) for own in bins.values())
        assert len(bins) > 5
        assert score.calibration_error == pytest.approx(100 * sum(gaps) / 200, rel=1e-5)


def test_certain_answers_are_calibrated_when_they_are_right() -> None:
    logits = torch.zeros(4, TREE.leaves, 2)
    logits[..., 1] = 100.0
    for target, error in (([1, 1, 1, 1], 0.0), ([1, 1, 1, 0], 25.0)):
        scores = Scores(TREE)
        scores.add(logits, torch.tensor(target))
        assert {score.calibration_error for score in scores.result()} == {error}


def test_every_leaf_is_scored_by_itself() -> None:
    logits, target = examples(50)
    scores = Scores(TREE)
    scores.add(logits[:20], target[:20])
    scores.add(logits[20:], target[20:])
    right = logits.argmax(2) == target[:, None]
    own = (100 * right.double().mean(0)).tolist()
    assert scores.leaf_accuracy() == pytest.approx(own)
    assert len(set(scores.leaf_accuracy())) > 1


def test_uneven_batches_give_the_scores_of_the_whole() -> None:
    logits, target = examples(50)
    scores = Scores(TREE)
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        scores.add(logits[part], target[part])
    assert scores.images == 50
    result = scores.result()
    assert [score.leaves for score in result] == [1, 3, 6]
    for score in result:
        mean = logits[:, : score.leaves].mean(1)
        assert score.accuracy == pytest.approx(
            100 * (mean.argmax(1) == target).double().mean().item()
        )
        assert score.nll == pytest.approx(F.cross_entropy(mean, target).item(), rel=1e-6)


def test_batches_counted_together_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = examples(600)
    parts = (slice(0, 64), slice(64, 65), slice(65, 300), slice(300, 600))

    def totals(together: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        monkeypatch.setattr("treeify.evaluation.metrics._TOGETHER", together)
        scores, seen = Scores(TREE), []
        for part in parts:
            scores.add(logits[part], target[part])
            seen.append(scores.accuracy)
        assert scores.images == 600
        return scores.state_dict(), seen

    one_by_one, seen = totals(1)
    together, unseen = totals(10**9)
    assert not any(map(math.isnan, seen))
    assert all(map(math.isnan, unseen))
    for name, total in one_by_one.items():
        assert torch.equal(total, together[name]), name


def test_accuracy_is_in_percent() -> None:
    logits = torch.zeros(4, TREE.leaves, 2)
    logits[..., 1] = 1.0
    scores = Scores(TREE)
    scores.add(logits, torch.tensor([1, 1, 1, 0]))
    assert {score.accuracy for score in scores.result()} == {75.0}


def test_half_precision_logits_are_scored_in_full() -> None:
    logits, target = examples(50)
    scores = Scores(TREE)
    scores.add(logits.bfloat16(), target)
    whole = Scores(TREE)
    whole.add(logits.bfloat16().float(), target)
    assert scores.result() == whole.result()


def test_no_images_have_no_score() -> None:
    with pytest.raises(DataError, match="no images"):
        Scores(TREE).result()


def test_scores_go_on_from_a_state() -> None:
    logits, target = examples(50)
    first, second = Scores(TREE), Scores(TREE)
    first.add(logits[:20], target[:20])
    second.load_state_dict({name: total.clone() for name, total in first.state_dict().items()})
    for scores in (first, second):
        scores.add(logits[20:], target[20:])
    assert second.images == 50
    assert second.result() == first.result()


def test_frozen_batch_norms_stay_frozen() -> None:
    hne = small.ensemble().train()
    norm = hne.get_submodule("stem.1").eval()
    modes = [module.training for module in hne.modules()]
    scores = measure(hne, [(small.images(3), torch.tensor([0, 1, 2]))])
    assert scores.images == 3
    assert not norm.training
    assert [module.training for module in hne.modules()] == modes


def test_measuring_between_epochs_keeps_no_weights_prepared_for_evaluation() -> None:
    hne = small.ensemble()
    hne.tune(small.images(3), repeats=1, budget=0.1)  # tuned plans fuse layers
    measure(hne.train(), [(small.images(3), torch.tensor([0, 1, 2]))])
    prepared = fusing.fused_modules(hne, Prepared)
    assert prepared
    assert not any(module._folded or module._cache for module in prepared)


def test_floats_are_converted_to_the_ensembles_dtype_and_integers_are_refused() -> None:
    hne, target = small.ensemble(), torch.tensor([0, 1, 2])
    x = small.images(3)
    assert measure(hne, [(x.double(), target)]).result() == measure(hne, [(x, target)]).result()
    with pytest.raises(InputError, match=r"torch\.uint8"):
        measure(hne, [(x.to(torch.uint8), target)])


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_of_no_class_is_refused(label: int) -> None:
    require_labels(torch.arange(4), 4)
    with pytest.raises(DataError, match=f"0 to 3(.|\n)*Found {label}"):
        require_labels(torch.tensor([0, label, 3]), 4)
    hne = small.ensemble()
    with pytest.raises(DataError, match="5 classes"):
        measure(hne, [(small.images(), torch.tensor([0, 5]))])


def test_shapes_without_values_are_no_images() -> None:
    hne, target = small.ensemble(), torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match="only shapes"):
        measure(hne, [(small.images(3).to("meta"), target)])
