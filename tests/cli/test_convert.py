"""`treeify convert` and `treeify splits`: what they show, write and refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from runner import run

import treeify
from treeify.conversion.initialize import branch_seed
from treeify.models.architecture import Architecture

SMALL = ["torchvision/squeezenet1_1", "--num-classes", "4", "--input-size", "32"]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_convert_shows_what_it_did_and_writes_what_load_reads() -> None:
    result = run("convert", *SMALL, "--splits", "2", "--out", "made")
    assert result.exit_code == 0, result.output
    for part in (
        "torchvision/squeezenet1_1(num_classes=4) at 3 x 32 x 32",
        "4 leaves, branches per level 1 2 4",
        "├─ level 1 branch 0: leaves 0-1",
        "base model",
        "independent",
        "of the branches' MACs run packed",
        "Parity with the base architecture holds",
        "Written to made; read it with treeify.load('made')",
    ):
        assert part in result.stdout
    hne = treeify.load("made")
    assert hne.tree.fanouts == (2, 2)
    assert hne(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4)


def test_numbers_of_split_points_are_whole_in_narrow_terminals() -> None:
    name = ["torchvision/squeezenet1_1", "--input-size", "224"]
    narrow, wide = run("splits", *name, columns=60), run("splits", *name)
    numbers = re.findall(r"[\d,]{7,}", wide.stdout)
    assert len(numbers) > 20
    assert re.findall(r"[\d,]{7,}", narrow.stdout) == numbers
    assert "…" not in narrow.stdout


def test_json_holds_the_same_and_nothing_else_is_printed() -> None:
    result = run("convert", *SMALL, "--splits", "features.7:3", "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == {
        "name": "torchvision/squeezenet1_1",
        "kwargs": {"num_classes": 4},
    }
    assert found["input"] == [3, 32, 32]
    assert [split["name"] for split in found["splits"]] == ["features.7"]
    assert [split["fanout"] for split in found["splits"]] == [3]
    split = found["splits"][0]
    assert split["macs_before"] + split["macs_after"] == found["base"]["macs"]
    assert [size["leaves"] for size in found["nested"]] == [1, 3]
    assert found["nested"][0]["macs"] == found["base"]["macs"]
    assert found["nested"][1]["macs"] == split["macs_before"] + 3 * split["macs_after"]
    assert found["nested"][1]["independent_macs"] == 3 * found["base"]["macs"]
    assert {node["runs"] for node in found["nodes"]} <= {"shared", "packed", "per branch"}
    assert found["parity"]["leaf_eval"] <= 1
    assert Path(found["out"]) == Path("converted/torchvision_squeezenet1_1")


def test_the_options_reach_the_library() -> None:
    result = run(
        *("convert", *SMALL, "--splits", "features.4,features.7", "--fanout", "3"),
        *("--init", "copy", "--seed", "5", "--no-verify", "--json", "--out", "made"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["leaves"] == 9
    assert found["parity"] is None
    with torch.random.fork_rng():
        torch.manual_seed(branch_seed(5, 0))
        base = Architecture("torchvision/squeezenet1_1", {"num_classes": 4}).build()
    leaf = treeify.load("made").leaf(8).state_dict()
    assert all(torch.equal(leaf[key], value) for key, value in base.state_dict().items())


def test_input_size_rebuilds_a_model_that_has_one() -> None:
    result = run(
        *("convert", "test_vit", "--input-size", "64", "--splits", "1", "--no-verify", "--json")
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["kwargs"] == {"img_size": 64}


def test_a_function_beside_the_user_is_found() -> None:
    Path("beside.py").write_text(
        "from torch import nn\n\n"
        "def tiny(num_classes=3):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    result = run("convert", "beside:tiny", "--splits", "4:2", "--input-size", "8", "--out", "made")
    assert result.exit_code == 0, result.output
    assert treeify.load("made", trust=True).leaves == 2


def test_splits_lists_points_in_order() -> None:
    result = run("splits", *SMALL, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = [point["name"] for point in found["points"]]
    assert names.index("features.3") < names.index("features.4") < names.index("classifier")
    totals = {point["macs_before"] + point["macs_after"] for point in found["points"]}
    assert len(totals) == 1
    shown = run("splits", *SMALL, "--clean").stdout
    assert "features.4 " in shown
    assert "features.3.expand3x3" not in shown


BAD = {
    "model": (["resnet5O"], "ModelError: there is no model 'resnet5O'", "'resnet50'"),
    "split": ([*SMALL, "--splits", "fetures.4"], "SplitError: split 'fetures.4'", "'features.4'"),
    "order": ([*SMALL, "--splits", "features.7,features.4"], "SplitError", "in order"),
    "repeat": ([*SMALL, "--splits", "features.4,features.4"], "SplitError", "repeats"),
    "fanout": ([*SMALL, "--fanout", "1"], "SplitError", "fanout of 2 or more"),
    "init": ([*SMALL, "--init", "zeros"], "InputError", "fresh, copy, perturb"),
    "pretrained": ([*SMALL, "--pretrained", "--init", "fresh"], "InputError", "--init copy"),
    "size": (["test_vit", "--input-size", "20"], "Error: ", "20"),
    "option": ([*SMALL, "--bogus"], "No such option", "--bogus"),
}


@pytest.mark.parametrize(("arguments", "problem", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message_and_writes_nothing(
    arguments: list[str], problem: str, remedy: str
) -> None:
    result = run("convert", *arguments)
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert remedy in result.stderr
    assert "Traceback" not in result.output
    assert list(Path.cwd().iterdir()) == []


def test_a_directory_in_use_is_kept_unless_overwritten() -> None:
    Path("made").mkdir()
    Path("made/notes.txt").write_text("mine")
    command = ["convert", *SMALL, "--splits", "1", "--no-verify", "--out", "made"]
    result = run(*command)
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert "--overwrite" in result.stderr
    assert [path.name for path in Path("made").iterdir()] == ["notes.txt"]
    assert run(*command, "--overwrite").exit_code == 0
    assert treeify.load("made").leaves == 2
