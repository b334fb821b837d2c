"""The ensemble of a run: refused if it does not fit, tuned if the recipe says so."""

from pathlib import Path

import pytest
import small
import torch
from torch.utils.data import TensorDataset

import treeify
from treeify.data import Data, Preparation, digits
from treeify.errors import RecipeError
from treeify.training.model import build, check_classes, fewest_images, other_classes
from treeify.training.recipe import ModelRecipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train


def test_a_model_that_returns_more_than_logits_is_refused() -> None:
    class Pair(small.SmallNet):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            logits = super().forward(x)
            return logits, logits

    hne = treeify.hierarchicalize(Pair(10), ["stage1"], init="fresh", example_input=small.EXAMPLE)
    with pytest.raises(RecipeError, match=r"does not return logits(?s:.)*tuple"):
        check_classes(hne, digits())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8, torch.int64])
def test_floats_of_any_precision_are_images_and_integers_are_none(
    recipe_file: Path, dtype: torch.dtype
) -> None:
    model = "model={name: 'small:build', kwargs: {classes: 10}, splits: [stage1]}"
    recipe = load_recipe(recipe_file, [model])
    images = TensorDataset(small.images(10).to(dtype), torch.arange(10))
    data = Data(images, images, tuple("abcdefghij"), "all held out")
    if dtype.is_floating_point:
        check_classes(build(recipe, data), data)
        return
    with pytest.raises(RecipeError, match=rf"{dtype}(?s:.)*Give floats"):
        build(recipe, data)


def test_a_classifier_of_other_classes_is_said() -> None:
    hne, model = small.ensemble(), ModelRecipe(name="small:build")
    images = TensorDataset(small.images(5), torch.arange(5))
    data = Data(images, images, tuple("abcde"), "all held out")
    assert other_classes(hne, data, model) is None
    hne.preparation = Preparation((16, 16), classes=tuple("abcde"))
    assert other_classes(hne, data, model) is None
    hne.preparation = Preparation((16, 16), classes=tuple("edcba"))
    assert "tell apart 'e', 'd'" in str(other_classes(hne, data, model))
    assert other_classes(hne, data, model.model_copy(update={"head": "fresh"})) is None


def test_counting_classes_leaves_frozen_batch_norms_frozen() -> None:
    hne = treeify.hierarchicalize(
        small.SmallNet(10), ["stage1"], init="fresh", example_input=small.EXAMPLE
    ).train()
    norm = hne.get_submodule("stem.1").eval()
    check_classes(hne, digits())
    assert hne.training
    assert not norm.training


@pytest.mark.parametrize(("size", "fewest"), [(8, 1), (1, 2)])
def test_a_batch_norm_of_one_pixel_needs_two_images(size: int, fewest: int) -> None:
    images = torch.rand(2, 3, size, size)
    data = Data([], [(image, 0) for image in images], ("a",), "all")
    hne = treeify.hierarchicalize(
        small.SmallNet(1), ["stage1"], init="copy", example_input=small.EXAMPLE
    )
    before = {key: value.clone() for key, value in hne.state_dict().items()}
    random = torch.get_rng_state()
    assert fewest_images(hne, data) == fewest
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in hne.state_dict().items())


def test_tuned_and_fixed_executions_train(recipe_file: Path) -> None:
    tuned = train(load_recipe(recipe_file, ["tune=true", "schedule.epochs=1"])).run
    assert {situation.training for situation in tuned.hne.tunings} == {True, False}
    assert treeify.load(tuned.directory / "last").tunings == tuned.hne.tunings
    looped = train(load_recipe(recipe_file, ["execution=[packed, looped, looped]"])).run
    assert looped.hne.execution == ("packed", "looped", "looped")
