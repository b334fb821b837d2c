"""`treeify calibrate`: what it measures, chooses, saves and refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import images_of, labels_of
from runner import run

import treeify
from treeify import files
from treeify.anytime.confidence import BUDGET
from treeify.data import digits

QUICK = ("--repeats", "10", "--no-tune")


def targets(hne: treeify.HierarchicalEnsemble) -> list[int]:
    """Two budgets between the cheapest and the dearest size."""
    least, most = hne.count_macs(1), hne.count_macs()
    return [least + (most - least) // 4, least + (most - least) // 2]


def options(hne: treeify.HierarchicalEnsemble) -> list[str]:
    return [word for target in targets(hne) for word in ("--target-macs", str(target))]


def test_everything_found_is_saved(hne: treeify.HierarchicalEnsemble) -> None:
    result = run(
        "calibrate", "run", "--trust", "--repeats", "10", "--batch-size", "2", *options(hne)
    )
    assert result.exit_code == 0, result.output
    for part in (
        "inference, 2x3x8x8 float32; * chosen",
        "medians of 10 rounds",
        "6 leaves, every image",
        f"budget {targets(hne)[0]:,}",
        "Thresholds were chosen on 180 held-out images; accuracy, MACs and stops are those of the"
        " 180 others (seed 0; 360 of 1,797 images held out",
        "Saved in run/last",
    ):
        assert part in result.stdout
    again = treeify.load("run/last", trust=True)
    assert list(again.budgets) == targets(hne)
    (tuning,) = again.tunings.values()
    (latencies,) = again.latencies.values()
    assert latencies.situation == tuning.situation
    assert latencies.situation.shape == (2, 3, 8, 8)
    assert latencies.plan == tuning.plan
    assert latencies.repeats == 10
    again.predict(torch.rand(2, 3, 8, 8), deadline=60.0)  # needs no further calibration


def test_ensembles_in_double_precision(hne: treeify.HierarchicalEnsemble) -> None:
    treeify.save(hne.double(), "run/last", overwrite=True)
    result = run("calibrate", "run", "--trust", *QUICK, *options(hne))
    assert result.exit_code == 0, result.output


def test_budgets_report_what_predict_does_on_the_other_half(
    hne: treeify.HierarchicalEnsemble,
) -> None:
    result = run("calibrate", "run", "--trust", *QUICK, *options(hne), "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    order = torch.randperm(360, generator=torch.Generator().manual_seed(3))
    held_out = digits(crop_padding=1).held_out
    images, labels = images_of(held_out), torch.tensor(labels_of(held_out))
    chosen, others = order[:180], order[180:]
    assert found["images"] == {"chosen_on": 180, "reported_on": 180}
    for row in found["fixed"]:
        logits = hne.predict(images[others], leaves=row["leaves"])
        accuracy = (logits.argmax(-1) == labels[others]).double().mean().item()
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["macs"] == hne.count_macs(row["leaves"])
    for target, row in zip(targets(hne), found["budgets"], strict=True):
        budget = treeify.load("run/last", trust=True).budgets[target]
        assert row.pop("milliseconds") > 0
        assert BUDGET.dump_python(budget, mode="json", by_alias=True) == row
        answer = hne.predict(images[others], confidence=budget)
        accuracy = (answer.logits.argmax(-1) == labels[others]).double().mean().item()
        macs = [hne.count_macs(n) for n in answer.leaves.tolist()]
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["macs"] == pytest.approx(sum(macs) / 180)
        stops = [(answer.leaves == size).double().mean().item() for size in budget.sizes]
        assert row["shares"] == pytest.approx(stops)
        own = hne.predict(images[chosen], confidence=budget).leaves.tolist()
        assert sum(map(hne.count_macs, own)) / 180 == pytest.approx(target, rel=0.02)


def test_without_targets_no_data_is_needed(directories: Path) -> None:
    result = run("calibrate", "alone", "--trust", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "budgets" not in found
    assert "tuning" not in found
    assert found["latencies"]["sizes"] == [1, 3, 6]
    (situation,) = treeify.load("alone", trust=True).latencies
    assert situation.shape == (1, 3, 8, 8)


def test_data_may_be_named(hne: treeify.HierarchicalEnsemble) -> None:
    target = f"{targets(hne)[0]:,}"
    result = run(
        *("calibrate", "alone", "--trust", *QUICK, "--target-macs", target),
        *("--data", "name=digits", "--data", "held_out=100"),
    )
    assert result.exit_code == 0, result.output
    assert treeify.load("alone", trust=True).budgets[targets(hne)[0]].images == 50


BAD: dict[str, tuple[list[str], str, str]] = {
    "no data": (["alone", "--target-macs", "60k"], "does not say what data", "--data name="),
    "no target": (["run", "--data", "held_out=100"], "nothing to choose", "--target-macs"),
    "no speed": (["run", "--target-ms", "1", "--batch-size", "2"], "one image at", "-size 1"),
    "accuracy": (["run", "--target-accuracy", "100"], "right for 100 % of the images", "at most"),
    "too fast": (["run", *QUICK, "--target-ms", "0.00001"], "mean of 1e-05 ms", "at least"),
    "target": (["run", "--target-macs", "much"], "no whole number", "60M"),
    "out of reach": (["run", "--target-macs", "3"], "--target-macs 3 cannot be kept", "(1 leaf)"),
    "size": (["run", "--data", "size=16", "--target-macs", "TARGET"], "another size", "--data"),
    "data": (["run", "--data", "siz=16", "--target-macs", "60k"], "RecipeError", "'size'"),
    "directory": (["nowhere"], "CheckpointError: nowhere holds no ensemble", "config.json"),
}


@pytest.mark.parametrize(("arguments", "problem", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message_and_changes_nothing(
    arguments: list[str], problem: str, remedy: str, hne: treeify.HierarchicalEnsemble
) -> None:
    before = {file: file.read_bytes() for file in Path.cwd().rglob("*") if file.is_file()}
    words = [str(targets(hne)[0]) if word == "TARGET" else word for word in arguments]
    result = run("calibrate", *words, "--trust")
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert remedy in result.stderr
    assert "Traceback" not in result.output
    assert {file: file.read_bytes() for file in Path.cwd().rglob("*") if file.is_file()} == before


def test_what_could_not_be_kept_is_not_measured(
    directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    result = run("calibrate", "run", "--trust", *QUICK)
    assert result.exit_code == 2
    assert "run/last cannot be written" in result.stderr


def test_an_interruption_leaves_the_ensemble_as_it_was(
    hne: treeify.HierarchicalEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "calibrate", interrupt)
    before = {file.name: file.read_bytes() for file in Path("run/last").iterdir()}
    result = run("calibrate", "run", "--trust", *QUICK, *options(hne))
    assert result.exit_code == 130
    assert {file.name: file.read_bytes() for file in Path("run/last").iterdir()} == before


@pytest.fixture
def states(hne: treeify.HierarchicalEnsemble, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The states of `run`, of which the only one is removed for another while it is measured."""
    states = Path("run/checkpoints")
    states.mkdir()
    Path("run/last").rename(states / "step-1")
    files.point(Path("run/last"), states / "step-1")
    measure = treeify.HierarchicalEnsemble.calibrate

    def rotate(self: treeify.HierarchicalEnsemble, *arguments: Any, **named: Any) -> Any:
        treeify.save(hne, states / "step-2")
        files.point(Path("run/last"), states / "step-2")
        files.withdraw(states / "step-1")
        return measure(self, *arguments, **named)

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "calibrate", rotate)
    return states


def test_a_state_that_vanishes_is_found_again_by_its_weights(
    hne: treeify.HierarchicalEnsemble, states: Path
) -> None:
    result = run("calibrate", "run", "--trust", *QUICK, *options(hne))
    assert result.exit_code == 0, result.output
    assert f"Saved in {states / 'step-2'}" in result.stdout
    again = treeify.load(states / "step-2", trust=True)
    assert again.latencies
    assert list(again.budgets) == targets(hne)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_measurements_of_weights_that_are_gone_are_shown_and_not_kept(
    hne: treeify.HierarchicalEnsemble, states: Path, words: list[str]
) -> None:
    with torch.no_grad():
        next(hne.parameters()).add_(1)
    result = run("calibrate", "run", "--trust", *QUICK, *words)
    assert result.exit_code == 2
    assert f"{states / 'step-1'} is gone, and what was measured of it is not kept" in result.stderr
    assert f"Found {states / 'step-2'} holds another ensemble." in result.stderr
    assert "cp -r run COPY" in result.stderr
    if words:
        assert json.loads(result.stdout)["latencies"]["repeats"] == 10
    else:
        assert "medians of 10 rounds" in result.stdout
    assert not treeify.load(states / "step-2", trust=True).latencies
