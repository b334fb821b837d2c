"""What is frozen and where a model's classifier is."""

from pathlib import Path

import pytest
import small
import torch
from torch import nn

import treeify
from treeify.errors import RecipeError
from treeify.training.fine_tuning import freeze, frozen_at_random, head_of, level_names, level_of
from treeify.training.recipe import ModelRecipe


def test_levels_are_named_by_where_they_begin() -> None:
    hne = small.ensemble()
    assert level_names(hne) == ["level 0", "level 1 (from stage1)", "level 2 (from stage2)"]
    assert [level_of(hne, key) for key in ("stem.1.running_var", "head.bias")] == [0, 2]


def test_freezing_again_changes_nothing() -> None:
    hne = small.ensemble()
    model = ModelRecipe(name="small:build", freeze=["stage?.0", "level 0"], freeze_norms=True)
    frozen = freeze(hne, model)
    assert frozen == freeze(hne, model)
    assert {"stem.1.running_mean", "stage1.0.weight", "stage2.0.bias"} <= frozen
    assert not frozen & {"stage1.1.weight", "stage1.1.running_mean", "head.weight"}
    hne.train()
    assert not hne.get_submodule("stem.1").training
    assert hne.get_submodule("stage1.1").training


def test_frozen_norms_stay_frozen_when_saved_and_in_smaller_ensembles(tmp_path: Path) -> None:
    hne = small.ensemble()
    freeze(hne, ModelRecipe(name="small:build", freeze=["level 0"], freeze_norms=True))
    treeify.save(hne, tmp_path / "saved")
    loaded = treeify.load(tmp_path / "saved", model=small.SmallNet())
    for ensemble in (loaded, hne.sub_ensemble(2)):
        ensemble.train()
        assert not ensemble.get_submodule("stem.1").training
        assert ensemble.get_submodule("stage1.1").training


class Functional(small.SmallNet):
    """Reads the weights of its last layer by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.stage1(self.stem(x)).mean((2, 3))
        return nn.functional.linear(features, self.head.weight, self.head.bias)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ self.weight


def test_the_head_is_the_last_that_has_weights() -> None:
    hne = treeify.hierarchicalize(
        Functional(), ["stage1"], init="copy", example_input=small.EXAMPLE
    )
    assert head_of(hne) == ["head"]
    bare = treeify.hierarchicalize(Bare(), ["input"], init="copy", example_input=small.EXAMPLE)
    with pytest.raises(RecipeError, match="Bare has no module that is its classifier"):
        head_of(bare)


def test_frozen_weights_that_nobody_trained_are_said() -> None:
    frozen = {"name": "resnet10t", "freeze": ["level 0"]}
    text = frozen_at_random(ModelRecipe.model_validate(frozen))
    assert text is not None and "keeps random weights" in text
    for trained in (
        {"pretrained": True},
        {"weights": "mine.pth"},
        {"kwargs": {"checkpoint_path": "mine.pth"}},
        {"name": "small:build"},
        {"freeze": []},
    ):
        assert frozen_at_random(ModelRecipe.model_validate({**frozen, **trained})) is None
