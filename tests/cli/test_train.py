"""`treeify train`: what it prints, and how it ends."""

import json
import signal
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import treeify
from treeify.cli.eval import evaluate
from treeify.cli.train import train as train_command
from treeify.training import trainer

app = typer.Typer()
app.command("train")(train_command)
app.command("eval")(evaluate)


def test_the_commands_print_plain_tables(recipe_file: Path) -> None:
    runner = CliRunner()
    trained = runner.invoke(app, ["train", str(recipe_file), "schedule.epochs=1", "--out", "here"])
    assert trained.exit_code == 0, trained.output
    assert "\x1b" not in trained.output
    for text in ("epoch 1/1", "accuracy %", "MACs", "parameters", "1,497 of 1,797", "here"):
        assert text in trained.output, text
    shown = runner.invoke(app, ["eval", "here", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    line = json.loads(Path("here/metrics.jsonl").read_text())
    for row, expected in zip(found["scores"], line["held_out"], strict=True):
        assert row["leaves"] == expected["leaves"]
        assert row["accuracy"] == pytest.approx(expected["accuracy"])
        assert row["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    macs, parameters = ([row[key] for row in found["scores"]] for key in ("macs", "parameters"))
    assert macs == sorted(set(macs))
    hne = treeify.load("here/best")
    assert parameters[-1] == sum(parameter.numel() for parameter in hne.parameters())


def test_ctrl_c_ends_the_command_with_130(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.Trainer._step

    def interrupting(self, *args):
        signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupting)
    stopped = CliRunner().invoke(app, ["train", str(recipe_file)])
    assert stopped.exit_code == 130
    assert "the state is saved in runs/tiny/last" in stopped.output
    assert treeify.load("runs/tiny/last").leaves == 4
