"""The recipe README starts with, in full: about half a minute on an idle core."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import treeify
from treeify.cli.train import train

RECIPE = Path(__file__).parents[2] / "recipes" / "digits_hne.yaml"

app = typer.Typer()
app.command()(train)


@pytest.mark.thorough
def test_the_digits_recipe_reaches_its_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [str(RECIPE)])
    assert result.exit_code == 0, result.output
    assert "360 of 1,797 images held out, stratified by class, random_state=0" in result.output
    run = tmp_path / "runs" / "digits_hne"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    accuracy = {score["leaves"]: score["accuracy"] for score in last["held_out"]}
    assert list(accuracy) == [1, 2, 4, 8, 16]
    assert accuracy[16] >= 97.5
    assert treeify.load(run / "last").leaves == 16
