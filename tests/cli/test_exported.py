"""Exports where commands take ensembles: the same answers, scores and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import saved_ensembles as saved
from runner import run
from torch import Tensor
from torch.testing import assert_close

import treeify
from treeify.data import DIGITS
from treeify.deploy.exported import ExportedEnsemble

SIZES = (1, 3, 6)


@pytest.fixture
def digits(directories: Path) -> tuple[list[str], Tensor]:
    """Files, and the images they are for the ensemble."""
    files, pixels = saved.write_digits(directories / "digits", 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in DIGITS)
    return files, (pixels - mean) / std


def answer(*arguments: str) -> Any:
    result = run("predict", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def check(found: Any, logits: Tensor, leaves: list[int]) -> None:
    """The last answers are those of the ensemble that was exported."""
    assert [image["leaves"] for image in found["images"]] == leaves
    for image, expected in zip(found["images"], logits.softmax(-1), strict=True):
        best = image["top"][0]
        assert best["class"] == expected.argmax()
        assert best["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
        assert image["answers"][-1]["probability"] == best["probability"]


def test_answers_are_the_ensemble_s(hne: Any, digits: Any, exported: Path) -> None:
    files, x = digits
    found = answer(str(exported), *files)
    check(found, hne.predict(x), [6] * 4)
    assert found["ensemble"] == str(exported)
    assert found["device"] == "cpu"
    for image in found["images"]:
        assert [step["leaves"] for step in image["answers"]] == list(SIZES)
        assert [step["macs"] for step in image["answers"]] == [hne.count_macs(n) for n in SIZES]
    check(answer(str(exported), *files, "--leaves", "3"), hne.predict(x, leaves=3), [3] * 4)
    table = run("predict", str(exported), files[0])
    assert f"{hne.count_macs(3):,}" in table.stdout


def test_confidence_stops_each_image_by_itself(hne: Any, digits: Any, exported: Path) -> None:
    files, x = digits
    level = hne.predict(x, leaves=1).softmax(-1).amax(-1).sort().values[1:3].mean().item()
    expected = hne.predict(x, confidence=level)
    assert len(set(expected.leaves.tolist())) > 1
    found = answer(str(exported), *files, "--confidence", str(level))
    check(found, expected.logits, expected.leaves.tolist())


def test_budgets_come_with_the_export(hne: Any, digits: Any, exported: Path) -> None:
    files, x = digits
    target = (hne.count_macs(1) + hne.count_macs()) // 2
    expected = hne.predict(x, confidence=(0.5, 0.9))
    found = answer(str(exported), *files, "--budget", str(target))
    check(found, expected.logits, expected.leaves.tolist())
    refused = run("predict", str(exported), *files, "--budget", "6k")
    assert refused.exit_code == 2
    assert f"Expected one of {target:,}" in refused.stderr
    assert "before treeify export" in refused.stderr


def test_a_deadline_is_measured_once(hne: Any, digits: Any, exported: Path) -> None:
    files, x = digits
    found = answer(str(exported), *files, "--deadline", "60s")
    assert found["measured_latencies"]
    assert any("kept in" in note for note in found["notes"])
    assert found["deadline_met"]
    check(found, hne.predict(x), [6] * 4)
    assert (exported / "latencies.json").exists()
    assert not answer(str(exported), *files, "--deadline", "60s")["measured_latencies"]


@pytest.fixture(scope="module")
def threes(saved_ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export that takes three images at a time, and whose first step has three leaves."""
    path = tmp_path_factory.mktemp("exported") / "threes"
    saved.export(saved_ensemble, path, sizes=(3, 6), batch=3)
    return str(path)


def test_fewer_images_than_an_export_takes_are_filled_up(
    hne: Any, digits: Any, threes: str
) -> None:
    files, x = digits
    check(answer(threes, *files), hne.predict(x), [6] * 4)
    sure = hne.predict(x, leaves=3).softmax(-1).amax(-1)
    level = sure.sort().values[1:3].mean().item()
    found = answer(threes, *files, "--confidence", str(level))
    used = [image["leaves"] for image in found["images"]]
    assert used == [3 if own >= level else 6 for own in sure.tolist()]


def test_calibrate_measures_steps(exported: Path) -> None:
    result = run("calibrate", str(exported), "--repeats", "10", "--batch-size", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["latencies"]
    ends = {(row["from"], row["to"]) for row in found["transitions"]}
    assert ends == {(0, 1), (0, 3), (0, 6), (1, 3), (3, 6)}
    assert all(row["typical"] > 0 for row in found["transitions"])
    assert (exported / "latencies.json").exists()
    shown = run("calibrate", str(exported), "--repeats", "10")
    assert "medians of 10 rounds" in shown.stdout
    assert f"Kept in {exported}" in shown.stdout


def test_scores_are_those_of_the_ensemble(exported: Path) -> None:
    options = ("--data", "name=digits", "--json", "--no-latency")
    expected = run("eval", "run", "--trust", *options[2:])
    found = run("eval", str(exported), *options)
    assert found.exit_code == 0, found.output
    own, theirs = json.loads(found.stdout), json.loads(expected.stdout)
    assert own["split"] == theirs["split"]
    assert own["base"] is None
    for row, other in zip(own["scores"], theirs["scores"], strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"gain_per_cost"}:
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    assert own["scores"][1]["gain_per_cost"] == pytest.approx(theirs["scores"][1]["gain_per_cost"])
    assert own["verdict"] == theirs["verdict"]
    assert own["leaf_accuracy"] == pytest.approx(theirs["leaf_accuracy"])
    table = run("eval", str(exported), "--data", "name=digits", "--csv", "scores.csv")
    assert table.exit_code == 0, table.output
    for words in ("ECE %", " ms", f"{own['scores'][2]['accuracy']:.2f}", "onnxruntime"):
        assert words in table.stdout
    assert len(Path("scores.csv").read_text("utf-8").splitlines()) == 1 + 3 + 6


def test_fewer_sizes_have_fewer_rows(hne: Any, threes: str) -> None:
    found = run("eval", threes, "--data", "name=digits", "--json", "--no-latency")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["scores"]
    assert [row["leaves"] for row in rows] == [3, 6]
    assert [row["macs"] for row in rows] == [hne.count_macs(size) for size in (3, 6)]
    assert [row["gain_per_cost"] for row in rows] == [None, None]  # what one leaf costs is unknown


BAD = {
    "device": ("predict digits/0.png --device cuda", "--device cuda", "auto or cpu"),
    "size": ("predict digits/0.png --input-size 16", "--input-size 16x16", "treeify export"),
    "leaves": ("predict digits/0.png --leaves 2", "2", "(1, 3, 6)"),
    "targets": ("calibrate --target-macs 60k", "thresholds cannot be chosen", "export again"),
    "weights": ("eval --weights x.pth --data name=digits", "--weights", "no base model"),
    "no data": ("eval", "does not say what data", "--data name="),
    "other data": ("eval --data name=digits --data size=16", "another shape", "(3, 8, 8)"),
}


@pytest.mark.parametrize(("words", "problem", "remedy"), BAD.values(), ids=BAD)
def test_what_an_export_cannot_do_is_refused(
    words: str, problem: str, remedy: str, exported: Path, digits: Any
) -> None:
    command, *arguments = words.split()
    result = run(command, str(exported), *arguments)
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert remedy in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


DAMAGES = {
    "no manifest": ("ensemble.json", b"{"),
    "manifest of others": ("ensemble.json", b"{}"),
    "truncated step": ("step-02.onnx", b"onnx"),
}


@pytest.mark.parametrize(("name", "content"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("command", ["predict", "calibrate", "eval"])
def test_a_damaged_export_is_one_message(
    command: str, name: str, content: bytes, exported: Path, digits: Any
) -> None:
    (exported / name).write_bytes(content)
    images = digits[0] if command == "predict" else []
    result = run(command, str(exported), *images)
    assert result.exit_code == 2, result.output
    assert "CheckpointError" in result.stderr
    assert name in result.stderr
    assert "Traceback" not in result.output


def test_a_missing_runtime_says_how_to_install_it(
    exported: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treeify.deploy.exported.find_spec", lambda name: None)
    result = run("predict", str(exported), *digits[0])
    assert result.exit_code == 2
    assert "pip install 'treeify[onnx]'" in result.stderr


def test_the_answers_are_tensors_with_the_ensemble_s_words(hne: Any, exported: Path) -> None:
    ensemble = ExportedEnsemble(exported, threads=1)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert_close(ensemble.leaf_logits(x), hne(x), rtol=1e-4, atol=1e-5)
    assert ensemble.tree == hne.tree
    assert treeify.load("alone", trust=True).count_macs(3) == ensemble.count_macs(3)
