"""Recipes of any content: a recipe that reads back the same, or every problem in a message."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.fuzzing import MANY, edited, edits, fuzzed, outcome, paths, replaced, values, words
from hypothesis import strategies as st
from runs import RECIPE, RICH

from treeify.training.recipe_file import dump_recipe, load_recipe, recipe_from

SNIPPETS = [
    *("&a [*a, *a]", "&a", "*a", "<<: *a", "!!python/object/apply:os.getcwd []", "!!timestamp x"),
    *("!!int x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "2024-13-45", "? [a]", "? {a: b}"),
    *("---", "...", "%YAML 9.9", "|", ">", "- ", "\t", '"', "'", "[" * 60, "{a: " * 60, "~: 1"),
    *("extends: /dev/zero", "extends: .", "name: 'os:getcwd'", "name: 'nowhere:x'", "1:2:3"),
]
texts = st.one_of(
    st.tuples(st.just(RECIPE.encode()), edits).map(lambda pair: edited(*pair)),
    st.tuples(st.integers(0, len(RECIPE)), st.sampled_from(SNIPPETS) | words).map(
        lambda pair: (RECIPE[: pair[0]] + pair[1] + RECIPE[pair[0] :]).encode(errors="replace")
    ),
    st.tuples(paths, values).map(
        lambda pair: yaml.safe_dump(replaced(yaml.safe_load(RECIPE), *pair)).encode()
    ),
    values.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode(errors="replace")),
    st.binary(max_size=200),
)
keys = st.sampled_from([*(pair.partition("=")[0] for pair in RICH), "model.kwargs.x", "loss", "a"])
overrides = st.lists(
    st.one_of(
        st.tuples(keys, words | st.sampled_from(SNIPPETS)).map("=".join),
        st.text(max_size=30),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def check(file: Path, content: bytes, changes: list[str]) -> None:
    file.write_bytes(content)
    recipe = outcome(lambda: load_recipe(file, changes))
    if recipe is not None:
        again: Any = yaml.safe_load(dump_recipe(recipe))
        assert recipe_from(again, [], "the recipe") == recipe


@fuzzed(150, content=texts, changes=overrides)
def test_a_recipe_of_any_content(file: Path, content: bytes, changes: list[str]) -> None:
    check(file, content, changes)


@fuzzed(MANY, content=texts, changes=overrides)
def test_ten_thousand_recipes(file: Path, content: bytes, changes: list[str]) -> None:
    check(file, content, changes)
