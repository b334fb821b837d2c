"""The tiny recipe, in a directory that runs may be written to."""

from pathlib import Path

import pytest
import runs

from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return runs.tiny(tmp_path)


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)
