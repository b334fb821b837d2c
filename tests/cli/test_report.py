"""`treeify report`: one page, or each figure by itself, and nothing where anything is wrong."""

import json
from pathlib import Path

import pytest
from runner import run

from treeify.cli.app import BAD_INPUT
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

QUICK = ("--no-latency", "--no-verify")


@pytest.fixture
def here(recipe_file: Path) -> Path:
    """Where the user is, with a run named `run`."""
    train(load_recipe(recipe_file, ["schedule.epochs=1"]), out=Path("run"))
    return recipe_file.parent


def test_report_writes_one_page_and_says_what_it_lacks(here: Path) -> None:
    done = run("report", "run", "--title", "My [run]", "--beside", "published", *QUICK)
    assert done.exit_code == 0, done.output
    assert "It was not calibrated: treeify calibrate run measures it." in done.output
    assert "No published points are known for its data (digits)" in done.output
    assert "Written to report.html" in done.output
    assert "<h1>My [run]</h1>" in (here / "report.html").read_text(encoding="utf-8")
    again = run("report", "run", *QUICK)
    assert again.exit_code == BAD_INPUT
    assert "exists already" in again.output
    assert run("report", "run", "--overwrite", *QUICK).exit_code == 0


def test_report_writes_figures_by_themselves_and_numbers_as_json(here: Path) -> None:
    done = run("report", "run", "--figures", "figures", "--format", "pdf", "--json", *QUICK)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert not (here / "report.html").exists()
    assert {str(path) for path in Path("figures").iterdir()} == set(found["written"])
    assert "figures/trade_off.pdf" in found["written"]
    (section,) = (each for each in found["sections"] if each["section"] == "The trade-off")
    (chart,) = section["charts"]
    assert [row["leaves"] for row in chart["rows"][:3]] == [1, 2, 4]
    both = run("report", "run", "--figures", "more", "--out", "page.html", *QUICK)
    assert both.exit_code == 0, both.output
    assert (here / "page.html").is_file()
    assert len(list(Path("more").iterdir())) == len(found["written"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "holds no ensemble"),
        (["run", "--out", "no/report.html"], "no as its directory"),
        (["run", "--out", "run"], "a directory"),
        (["run", "--figures", "run"], "not empty"),
        (["run", "--figures", "tiny.yaml/figures"], "a file"),
        (["run", "--figures", "new", "--format", "gif"], "gif"),
        (["run", "--beside", "others"], "beside"),
        (["run", "--data", "root"], "root"),
        (["run", "--data", "name=no_such_data"], "no_such_data"),
        (["run", "old"], "those of another version"),
        (["run", "./run"], "given twice"),
    ],
)
def test_report_refuses_bad_input_and_writes_nothing(
    here: Path, arguments: list[str], message: str
) -> None:
    Path("old").mkdir()
    Path("old/results.json").write_text('[{"variant": "a", "results": []}]')
    before = sorted(path for path in here.rglob("*"))
    done = run("report", *arguments, *QUICK)
    assert done.exit_code == BAD_INPUT, done.output
    assert message in done.output
    assert sorted(path for path in here.rglob("*")) == before
