"""`treeify predict`: answers that grow, end in time, and equal the library's."""

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
from treeify.anytime.confidence import Budget
from treeify.data import DIGITS
from treeify.errors import CheckpointError

SIZES = (1, 3, 6)


@pytest.fixture
def digits(directories: Path) -> tuple[list[str], Tensor]:
    """Files, and the images they are for the ensemble."""
    files, pixels = saved.write_digits(directories / "digits", 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in DIGITS)
    return files, (pixels - mean) / std


def answer(*arguments: str) -> Any:
    result = run("predict", "run", "--trust", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def check(found: Any, logits: Tensor, leaves: list[int]) -> None:
    """The last answers are those of the library."""
    assert [image["leaves"] for image in found["images"]] == leaves
    for image, expected in zip(found["images"], logits.softmax(-1), strict=True):
        top = image["top"]
        assert [row["class"] for row in top] == expected.topk(len(top)).indices.tolist()
        shown = torch.tensor([row["probability"] for row in top])
        assert_close(shown, expected.topk(len(top)).values, rtol=1e-4, atol=1e-5)
        last = image["answers"][-1]
        assert (last["leaves"], last["class"]) == (image["leaves"], top[0]["class"])
        assert last["probability"] == top[0]["probability"]


def test_json_equals_the_library(hne: Any, digits: Any) -> None:
    files, x = digits
    found = answer(*files, "--top", "3")
    check(found, hne.predict(x), [6] * 4)
    assert found["ensemble"] == str(Path("run/last"))
    assert "digits" in found["normalisation"]
    assert [image["path"] for image in found["images"]] == files
    for number, image in enumerate(found["images"]):
        assert [step["leaves"] for step in image["answers"]] == list(SIZES)
        assert [step["macs"] for step in image["answers"]] == [hne.count_macs(n) for n in SIZES]
        times = [step["elapsed_ms"] for step in image["answers"]]
        assert times == sorted(times)
        for step in image["answers"]:
            expected = hne.predict(x, leaves=step["leaves"])[number].softmax(-1)
            assert step["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
    assert found["deadline_met"] is None


def test_leaves_end_where_they_are_asked_to(hne: Any, digits: Any) -> None:
    files, x = digits
    found = answer(*files, "--leaves", "4")
    check(found, hne.predict(x, leaves=4), [4] * 4)
    assert [step["leaves"] for step in found["images"][0]["answers"]] == [1, 3, 4]


def test_tables_show_every_step_and_the_likeliest_classes(hne: Any, digits: Any) -> None:
    files, x = digits
    Path("names.txt").write_text("\n".join(f"[b]class {name}" for name in "abcdefghij"))
    result = run("predict", "run", "--trust", files[0], "--labels", "names.txt", "--top", "2")
    assert result.exit_code == 0, result.output
    best = "abcdefghij"[hne.predict(x[:1]).argmax()]
    assert result.stdout.count(f"[b]class {best}") >= 2  # the last step, and the end
    for size in SIZES:
        assert f"{hne.count_macs(size):,}" in result.stdout
    assert "mean 0.3053 0.3053 0.3053" in result.stdout
    several = run("predict", "run", "--trust", *files, "--top", "1")
    assert all(several.stdout.count(Path(file).name) == 2 for file in files)


def test_on_a_terminal_the_table_grows(
    hne: Any, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run("predict", "run", "--trust", digits[0][0])
    assert result.exit_code == 0, result.output
    tables = result.stdout.split("probability %")[1:]
    rows = [sum(f"{hne.count_macs(size):,}" in table for size in SIZES) for table in tables]
    assert rows[: len(SIZES)] == [1, 2, 3]


def test_a_deadline_is_met_and_measured_only_once(hne: Any, digits: Any) -> None:
    files, x = digits
    found = answer(*files, "--deadline", "60s")
    assert found["measured_latencies"]
    assert any("kept in" in note for note in found["notes"])
    assert found["deadline_met"]
    assert found["elapsed_ms"] < found["deadline_ms"] == 60_000
    check(found, hne.predict(x), [6] * 4)
    assert len(treeify.load("run/last", trust=True).latencies) == 1
    assert not answer(*files, "--deadline", "60s")["measured_latencies"]
    assert answer(files[0], "--deadline", "60s")["measured_latencies"]  # another shape
    assert len(treeify.load("run/last", trust=True).latencies) == 2


def test_however_short_a_deadline_there_is_an_answer(hne: Any, digits: Any) -> None:
    files, x = digits
    found = answer(*files, "--deadline", "1us")
    check(found, hne.predict(x, leaves=1), [1] * 4)
    assert found["deadline_met"] is False
    result = run("predict", "run", "--trust", *files, "--deadline", "1us")
    assert "Deadline of 0.001 ms missed: answered after" in result.stdout


def test_latencies_that_cannot_be_kept_are_used_all_the_same(
    hne: Any, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise CheckpointError("run/last cannot be written: read-only.")

    monkeypatch.setattr("treeify.conversion.saving.save_measurements", refuse)
    found = answer(*digits[0], "--deadline", "60s")
    assert found["deadline_met"]
    assert "not kept: run/last cannot be written: read-only." in found["notes"][-1]


@pytest.mark.parametrize("droppable", [True, False])
def test_confidence_stops_each_image_by_itself(
    droppable: bool, hne: Any, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, x = digits
    if not droppable:
        monkeypatch.setattr("treeify.anytime.session.Session.droppable", False)
    sure = hne.predict(x, leaves=1).softmax(-1).amax(-1)
    wanted = sure.sort().values[1:3].mean().item()
    expected = hne.predict(x, confidence=wanted)
    assert 1 in expected.leaves
    assert max(expected.leaves) > 1
    found = answer(*files, "--confidence", str(wanted))
    check(found, expected.logits, expected.leaves.tolist())
    assert found["macs"] == sum(hne.count_macs(n) for n in expected.leaves.tolist()) / 4


def test_a_budget_goes_by_the_saved_thresholds(hne: Any, digits: Any) -> None:
    files, x = digits
    sure = hne.predict(x, leaves=1).softmax(-1).amax(-1).median().item()
    hne.budgets[20_000] = Budget(20_000, SIZES, (sure, 0.9), 0.0, 0.0, (0.0,) * 3, 1)
    treeify.conversion.saving.save_measurements(hne, "run/last")
    expected = hne.predict(x, confidence=hne.budgets[20_000])
    found = answer(*files, "--budget", "20k")
    check(found, expected.logits, expected.leaves.tolist())
    result = run("predict", "run", "--trust", *files, "--budget", "30k")
    assert result.exit_code == 2
    assert "Expected one of 20,000" in result.stderr
    assert "treeify calibrate run/last --target-macs 30000" in result.stderr


def test_imagenet_names_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hne = treeify.hierarchicalize("test_resnet", 1, example_input=torch.zeros(1, 3, 32, 32))
    treeify.save(hne, "run")
    files, _ = saved.write_digits(tmp_path / "digits", 1)
    found = answer(*files)
    assert "timm's for test_resnet" in found["normalisation"]
    names = [row["label"] for row in found["images"][0]["top"]]
    assert len(set(names)) == 5
    assert all(name and not name.isdigit() for name in names)


BAD = {
    "files": (["run", "digits/0.png", "no.png", "neither.png"], "2 images of 3", "'neither.png'"),
    "directory": (["digits", "digits/0.png"], "CheckpointError: digits holds no", "config.json"),
    "duration": (["run", "digits/0.png", "--deadline", "20 parsecs"], "no duration", "20ms"),
    "count": (["run", "digits/0.png", "--budget", "much"], "no whole number", "60M"),
    "several": (["run", "digits/0.png", "--leaves", "2", "--budget", "6k"], "--leaves and", "one"),
    "leaves": (["run", "digits/0.png", "--leaves", "7"], "LeafError", "6"),
    "budget": (["run", "digits/0.png", "--budget", "6k"], "no thresholds are saved", "calibrate"),
    "labels": (["run", "digits/0.png", "--labels", "two.txt"], "--labels do not fit", "10 lines"),
    "no labels": (["run", "digits/0.png", "--labels", "three.txt"], "cannot be read", "UTF-8"),
    "statistics": (["run", "digits/0.png", "--mean", "x"], "no list of numbers", "0.5,0.5,0.5"),
    "device": (["run", "digits/0.png", "--device", "cuda:9"], "'cuda:9' is not there", "auto"),
}


@pytest.mark.parametrize(("arguments", "problem", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message(
    arguments: list[str], problem: str, remedy: str, digits: Any
) -> None:
    Path("two.txt").write_text("a\nb\n")
    before = Path("run/last/config.json").read_bytes()
    result = run("predict", *arguments, "--trust")
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert remedy in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert Path("run/last/config.json").read_bytes() == before
