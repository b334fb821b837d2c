"""`treeify benchmark`: ensembles and exports side by side, in every engine there is."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_exports
from runner import run

from treeify.deploy import speed
from treeify.deploy.exported import ExportedEnsemble


@pytest.fixture(autouse=True)
def one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.cli.benchmark.installed_engines", lambda: ("onnxruntime",))


def report(*arguments: str) -> Any:
    result = run("benchmark", *arguments, "--repeats", "3", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_ensembles_and_exports_stand_side_by_side(exported: Path) -> None:
    found = report("alone", str(exported), "--trust", "--threads", "1", "--batch", "2")
    assert (found["threads"], found["batch"]) == (1, 2)
    ensemble, export = found["rows"]
    assert [row["engine"] for row in found["rows"]] == ["PyTorch", "onnxruntime"]
    assert [row["directory"] for row in found["rows"]] == ["alone", str(exported)]
    assert ensemble["sizes"] == export["sizes"] == [1, 3, 6]
    assert export["base"] is None
    for row in found["rows"]:
        times = [row[name] for name in ("base", "first", "steps", "call") if row[name]]
        for seconds in times:
            low, high = seconds["quartiles"]
            assert 0 < low <= seconds["median"] <= high
            assert seconds["rounds"] == 3
        base = row["base"] or row["first"]
        assert row["call_per_base"] == row["call"]["median"] / base["median"]
        assert row["accuracy"] is None
    assert export["bytes"] == sum(file.stat().st_size for file in exported.glob("*.onnx"))


def test_accuracy_is_that_of_eval(exported: Path) -> None:
    data = ("--data", "name=digits")
    found = report("alone", str(exported), "--trust", *data)
    result = run("eval", "alone", "--trust", *data, "--no-latency", "--json")
    scores = json.loads(result.stdout)["scores"]
    expected = {str(score["leaves"]): score["accuracy"] for score in scores}
    for row in found["rows"]:
        assert row["accuracy"] == pytest.approx(expected, abs=0.2)


@pytest.mark.usefixtures("directories")
def test_a_table_says_what_its_columns_are() -> None:
    tiny_exports.write(Path("tiny"), batch=2)
    result = run("benchmark", "alone", "tiny", "--trust", "--repeats", "3")
    assert result.exit_code == 0, result.output
    for words in ("call / base", "An export has none", "±", "onnxruntime"):
        assert words in result.stdout
    assert "tiny takes 2 images, and was given as many." in result.stdout
    alone = run("benchmark", "alone", "--trust", "--repeats", "3").stdout
    assert "An export has none" not in alone


def test_every_engine_that_is_installed_has_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny")
    monkeypatch.setattr("treeify.cli.benchmark.installed_engines", speed.installed_engines)
    there = {"onnxruntime": object()}
    monkeypatch.setattr("treeify.deploy.speed.find_spec", there.get)
    assert [row["engine"] for row in report(str(tiny.path))["rows"]] == ["onnxruntime"]


def test_ways_to_answer_answer(tmp_path: Path) -> None:
    exported = ExportedEnsemble(tiny_exports.write(tmp_path / "tiny").path)
    x = exported.example_images(3)
    actions = speed.export_actions(exported, "onnxruntime", 1, x)
    assert actions["first"]().leaves == 1
    assert [step.leaves for step in actions["steps"]()] == [1, 2, 4]
    assert actions["call"]().shape == (3, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "holds no ensemble"),
        (["alone"], "trust"),
        (["alone", "--trust", "--data", "name=nothing"], "nothing"),
    ],
)
@pytest.mark.usefixtures("directories")
def test_bad_input_is_one_message(words: list[str], message: str) -> None:
    result = run("benchmark", *words, "--repeats", "3")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
