"""The figures in docs/figures are those of the results and points beside them."""

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import runs

import treeify
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import RunDirectory
from treeify.training.trainer import train

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "figures"
STALE = "run python docs/figures.py"


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "figures.py"))


@pytest.fixture(scope="module")
def charts(generator: dict[str, Any]) -> list[Any]:
    return list(generator["charts"]())


def test_no_figure_is_stale(generator: dict[str, Any], charts: list[Any]) -> None:
    assert {f"{chart.name}.svg" for chart in charts} == {path.name for path in FOLDER.iterdir()}
    for chart in charts:
        text = (FOLDER / f"{chart.name}.svg").read_text("utf-8")
        assert generator["digest"](chart) in text, f"{chart.name}: {STALE}"
        if f"Matplotlib v{matplotlib.__version__}," in text:  # others draw the same otherwise
            assert generator["svg"](chart) == text, f"{chart.name}: {STALE}"


def test_a_changed_number_is_noticed(generator: dict[str, Any], charts: list[Any]) -> None:
    digest = generator["digest"]
    chart = charts[0]
    before = digest(chart)
    row = (*chart.table.rows[0][:-1], chart.table.rows[0][-1] + 0.01)
    table = type(chart.table)(chart.table.columns, (row, *chart.table.rows[1:]))
    changed = type(chart)(chart.name, chart.title, chart.description, chart.figure, table)
    assert digest(changed) != before == digest(chart)


def test_files_are_small_fetch_nothing_and_say_what_they_show(charts: list[Any]) -> None:
    for chart in charts:
        content = (FOLDER / f"{chart.name}.svg").read_bytes()
        assert len(content) < 100_000
        root = ElementTree.fromstring(content)
        text = content.decode()
        assert chart.title in text
        assert "<dc:date>" not in text
        for element in root.iter():
            links = [value for key, value in element.attrib.items() if key.endswith("href")]
            assert all(link.startswith("#") for link in links)


def test_every_figure_is_shown_with_words_for_who_cannot_see_it() -> None:
    shown: set[str] = set()
    for page in [*DOCS.glob("*.md"), *DOCS.glob("results/*.md")]:
        for words, path in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text("utf-8")):
            target = (page.parent / path).resolve()
            if target.parent == FOLDER:
                assert words
                assert target.is_file(), f"{page.name} shows {path}"
                shown.add(target.name)
    assert shown == {path.name for path in FOLDER.iterdir()}


def test_first_leaves_are_measured_whatever_the_nested_sizes(tmp_path: Path) -> None:
    run = tmp_path / "grid" / "once" / "seed3"
    changes = ["schedule.epochs=1", "model.splits=[block4:16]"]
    train(load_recipe(runs.tiny(tmp_path), changes), out=run)
    (row,) = runpy.run_path(str(DOCS / "first_leaves.py"))["rows"](tmp_path / "grid")
    assert (row["variant"], row["seed"]) == ("once", 3)
    hne = treeify.load(run / "last")
    assert hne.tree.nested_sizes == (1, 16)
    assert [score["leaves"] for score in row["held_out"]] == [1, 2, 4, 8, 16]
    assert row["macs"] == [hne.count_macs(size) for size in (1, 2, 4, 8, 16)]
    (epoch,) = RunDirectory(run).metrics()
    for score in epoch.held_out:
        same = next(own for own in row["held_out"] if own["leaves"] == score.leaves)
        assert same["accuracy"] == pytest.approx(score.accuracy)
        assert same["nll"] == pytest.approx(score.nll, rel=1e-4)
