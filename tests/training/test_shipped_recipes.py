"""Recipes that come with treeify are found by name, say what they are, and can be copied."""

from pathlib import Path

import pytest

from treeify.errors import RecipeError
from treeify.training import shipped_recipes
from treeify.training.ablation import expand
from treeify.training.recipe_file import load_recipe

FILES = sorted(shipped_recipes.folder().rglob("*.yaml"))


def test_every_file_has_a_name() -> None:
    assert {shipped_recipes.find(name) for name in shipped_recipes.names()} == set(FILES)


@pytest.mark.parametrize("name", shipped_recipes.names())
def test_every_recipe_says_what_it_is(name: str) -> None:
    recipe = shipped_recipes.shipped(name)
    assert recipe.name == name
    assert recipe.path.read_text().replace("\n# ", " ").startswith(f"# {recipe.about}")
    assert len(recipe.about) > 10
    assert recipe.data
    assert recipe.network


def test_a_grid_is_told_from_a_recipe() -> None:
    assert shipped_recipes.shipped("ablations/figure5").is_grid
    assert not shipped_recipes.shipped("ablations/structured").is_grid


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_recipes.find("digits_hne")
    assert (
        shipped
        == shipped_recipes.find("digits_hne.yaml")
        == shipped_recipes.folder() / ("digits_hne.yaml")
    )
    Path("digits_hne").write_text("name: mine\n")
    assert shipped_recipes.find("digits_hne") == Path("digits_hne")
    assert shipped_recipes.find("digits_hne.yaml") == shipped


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("digit_hne", "digits_hne"),
        ("recipes/digits_hne.yaml", "digits_hne"),
        ("table1", "ablations/table1"),
        ("../digits_hne", "digits_hne"),
    ],
)
def test_an_unknown_name_lists_near_ones(
    word: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=f"did you mean.*{meant}"):
        shipped_recipes.find(word)


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    outside = f"../{'../' * 20}{tmp_path}/mine"
    with pytest.raises(RecipeError, match="is no recipe"):
        shipped_recipes.shipped(outside)


@pytest.mark.parametrize("name", ["cifar10_resnet_hne_small", "ablations/structured"])
def test_a_copy_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    copies = shipped_recipes.copy(name, tmp_path / "mine")
    assert copies[0] == tmp_path / "mine" / f"{name}.yaml"
    recipe = load_recipe(shipped_recipes.find(name), ["data.root=/data"])
    assert load_recipe(copies[0], ["data.root=/data"]) == recipe


def test_a_copied_grid_has_all_its_recipes(tmp_path: Path) -> None:
    copies = shipped_recipes.copy("ablations/figure5", tmp_path)
    assert len(copies) == 4
    assert len(expand(copies[0], tmp_path / "runs")) == 3


def test_copies_replace_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "cifar_resnet_hne.yaml"
    mine.write_text("name: mine\n")
    with pytest.raises(RecipeError, match=r"would replace files that are there.*\n.*\n.*cifar_res"):
        shipped_recipes.copy("cifar_resnet_hne_small", tmp_path)
    assert [*tmp_path.iterdir()] == [mine]
    assert mine.read_text() == "name: mine\n"
