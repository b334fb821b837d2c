"""Files of an earlier version still load: `saved/` was written by commit db225ff, never again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import treeify
from treeify.conversion.saving import save_measurements
from treeify.deploy.saved import checkpoint_in
from treeify.engine.plan import Situation
from treeify.errors import CheckpointError
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

SAVED = Path(__file__).with_name("saved")


def test_an_ensemble_gives_the_answers_it_gave() -> None:
    answers = load_file(SAVED / "answers.safetensors")
    hne = treeify.load(SAVED / "ensemble", trust=True)
    with torch.no_grad():
        torch.testing.assert_close(hne(answers["images"]), answers["logits"])


def test_an_ensemble_has_what_was_measured() -> None:
    config = json.loads((SAVED / "ensemble" / "config.json").read_text())
    hne = treeify.load(SAVED / "ensemble", trust=True)
    assert hne.execution == ("packed", "auto", "looped")
    (tuning,) = hne.tunings.values()
    assert tuning.seconds == config["tunings"][0]["seconds"]
    assert tuning.situation.shape == (2, 3, 8, 8)
    (latencies,) = hne.latencies.values()
    assert latencies.plan == tuning.plan
    assert latencies.typical[0, 6] == config["latencies"][0]["transitions"][2]["typical"]
    (budget,) = hne.budgets.values()
    assert budget.thresholds == tuple(config["budgets"][0]["thresholds"])


def test_measurements_are_written_as_they_were(tmp_path: Path) -> None:
    """So that the version that wrote them can read what this one writes."""
    treeify.save(treeify.load(SAVED / "ensemble", trust=True), tmp_path / "again")
    before, after = (
        json.loads((path / "config.json").read_text())
        for path in (SAVED / "ensemble", tmp_path / "again")
    )
    for config in (before, after):
        for key in ("identity", "versions", "treeify", "files", "checksum"):
            config.pop(key, None)  # what tells that files are whole came later
    assert after == before


def test_an_ensemble_that_is_measured_again_gets_checksums(tmp_path: Path) -> None:
    path = shutil.copytree(SAVED / "ensemble", tmp_path / "ensemble")
    hne = treeify.load(path, trust=True)
    hne.execution = "looped"
    save_measurements(hne, path)
    again = treeify.load(path, trust=True)
    assert again.execution == "looped"
    assert again.measurements == hne.measurements
    weights = path / "model.safetensors"
    *content, last = weights.read_bytes()
    weights.write_bytes(bytes([*content, last ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        treeify.load(path, trust=True)


def test_a_run_goes_on_to_the_end_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(SAVED / "run", tmp_path / "run", symlinks=True)
    monkeypatch.chdir(tmp_path)
    result = train(load_recipe(SAVED / "recipe.yaml"), resume=run)
    assert not result.interrupted
    first, last = (
        (run / "metrics.jsonl").read_text().splitlines(),
        (SAVED / "metrics.jsonl").read_text().splitlines(),
    )
    assert first[0] == (SAVED / "run" / "metrics.jsonl").read_text().strip()
    found, expected = (json.loads(lines[1]) for lines in (first, last))
    assert found.keys() == expected.keys()
    assert found["step"] == expected["step"] == 8
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for part in ("train", "held_out"):
        for score, before in zip(found[part], expected[part], strict=True):
            assert score.keys() == before.keys()
            assert score["nll"] == pytest.approx(before["nll"], rel=1e-3)


def test_a_run_directory_is_an_ensemble_for_other_commands() -> None:
    hne = treeify.load(checkpoint_in(SAVED / "run"))
    assert hne.architecture is not None
    assert hne.architecture.name == "treeify.models:cifar_resnet50"


def test_situations_are_keys(tmp_path: Path) -> None:
    hne = treeify.load(SAVED / "ensemble", trust=True)
    assert all(isinstance(key, Situation) for key in (*hne.tunings, *hne.latencies))
