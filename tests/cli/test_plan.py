"""`treeify plan`: what it shows, that what it says to paste is accepted, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import pytest
import runs
import yaml
from runner import run

import treeify
from treeify.planning.split_plan import RANKING
from treeify.training.recipe_file import load_recipe

SMALL = ["torchvision/squeezenet1_1", "--num-classes", "4", "--input-size", "32"]
NET = """\
from torch import nn


def net(num_classes=10, width=8):
    stage = lambda channels: nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    )
    return nn.Sequential(
        stage(3), stage(width), stage(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )
"""


@pytest.fixture(autouse=True)
def in_a_directory_with_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("planned.py").write_text(NET)


def test_the_table_shows_every_tree_and_the_pick_in_a_sentence() -> None:
    result = run("plan", *SMALL)
    assert result.exit_code == 0, result.output
    for part in (RANKING, "Pick 1 of ", "--splits ", "model:", "No budget was given", "mean own"):
        assert part in result.stdout
    rows = re.findall(r"^│ +(\d+) │", result.stdout, re.MULTILINE)
    assert rows == [str(number) for number in range(1, len(rows) + 1)]
    assert len(rows) > 3


def test_json_holds_the_same_and_nothing_else_is_printed() -> None:
    result = run("plan", *SMALL, "--max-params", "3M", "--leaves", "4..8", "--pick", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["budget"] == {"quantity": "params", "most": 3_000_000, "asked": True}
    assert found["picked"] == 2
    assert found["input"] == [3, 32, 32]
    assert found["optimal"] >= len(found["candidates"])
    assert found["ranking"] == RANKING
    chosen = found["candidates"][1]
    assert found["option"] == f"--splits {','.join(chosen['splits'])}"
    assert yaml.safe_load(found["recipe"])["model"]["splits"] == chosen["splits"]
    assert chosen["nested"][-1]["parameters"] <= 3_000_000
    assert chosen["forecast"] is None


def test_the_splits_line_is_what_convert_takes() -> None:
    planned = run("plan", *SMALL, "--leaves", "8", "--json")
    found = json.loads(planned.stdout)
    options = shlex.split(found["option"])
    result = run("convert", *SMALL, *options, "--no-verify", "--json", "--out", "made")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["base"]["macs"] == found["base"]["macs"]
    assert [size["macs"] for size in made["nested"]] == [
        cost["macs"] for cost in found["candidates"][0]["nested"]
    ]
    assert [size["parameters"] for size in made["nested"]] == [
        cost["parameters"] for cost in found["candidates"][0]["nested"]
    ]
    # The line stands by itself, too, to be copied.
    assert f"\n{found['option']}\n" in run("plan", *SMALL, "--leaves", "8").stdout


def test_the_recipe_fragment_is_what_train_takes() -> None:
    planned = run(
        "plan", "planned:net", "--num-classes", "10", "--input-size", "8", "--leaves", "4"
    )
    assert planned.exit_code == 0, planned.output
    # As one pastes it: from the table's end, in the place of the recipe's section.
    fragment = re.search(r"^model:\n(?:  .*\n|- .*\n)+", planned.stdout, re.MULTILINE)
    assert fragment is not None
    recipe = re.sub(r"^model:\n(?:  .*\n)+", fragment[0], runs.RECIPE, flags=re.MULTILINE)
    Path("recipe.yaml").write_text(recipe)
    loaded = load_recipe(Path("recipe.yaml"))
    assert loaded.model.name == "planned:net"
    assert loaded.model.kwargs == {"num_classes": 10}
    result = run("train", "recipe.yaml", "schedule.epochs=1", "--out", "run")
    assert result.exit_code == 0, result.output
    (config,) = Path("run").glob("last/config.json")
    assert treeify.load(config.parent, trust=True).leaves == 4


def test_times_are_forecast_and_measured() -> None:
    name = ["planned:net", "--input-size", "8", "--leaves", "4"]
    result = run("plan", *name, "--max-ms", "1s", "--measure")
    assert result.exit_code == 0, result.output
    assert "at most 1,000 ms" in result.stdout
    header = next(line for line in result.stdout.splitlines() if "splits" in line)
    assert "ms, forecast" in header
    assert "ms, measured" in header


@pytest.mark.parametrize("format", ["svg", "pdf", "png"])
def test_the_picture_is_written(format: str) -> None:
    file = Path(f"plan.{format}")
    result = run("plan", *SMALL, "--figure", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes()[:4] in (b"<?xm", b"%PDF", b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--first-macs", "3G", "--max-macs", "2G"], "first_macs is above max_macs"),
        (["--first-macs", "1k"], "which is the nearest possible"),
        (["--max-macs", "1k"], "the nearest possible: 4 leaves"),
        (["--max-mb", "1kB"], "the nearest possible: 4 leaves"),
        (["--max-macs", "1G", "--max-mb", "5"], "a plan has one budget"),
        (["--max-ms", "soon"], "--max-ms 'soon' is no duration"),
        (["--leaves", "32..4"], "--leaves '32..4' is no range"),
        (["--leaves", "5..7"], "the nearest possible: 4 or 8"),
        (["--fanouts", "1,2"], "a fanout is no integer in range"),
        (["--pick", "99"], "pick is no integer in range"),
        (["--figure", "plan.jpg"], "figures cannot be written as 'jpg'"),
        (["--figure", "nowhere/plan.svg"], "--figure nowhere/plan.svg cannot be written"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    arguments: list[str], message: str
) -> None:
    before = sorted(Path().iterdir())
    result = run("plan", *SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout
    assert sorted(Path().iterdir()) == before
