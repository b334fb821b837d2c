"""`treeify eval`: scores of what training left behind."""

import csv
import json
from pathlib import Path

import pytest
import torch
import typer
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from typer.testing import CliRunner

import treeify
from treeify.cli.eval import evaluate
from treeify.cli.train import train as train_command
from treeify.errors import CheckpointError, RecipeError
from treeify.evaluation.cost import costs
from treeify.training.loaders import held_out_loader
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

app = typer.Typer()
app.command("train")(train_command)
app.command("eval")(evaluate)


def test_eval_takes_checkpoints_and_other_data(recipe_file: Path) -> None:
    runner = CliRunner()
    runner.invoke(app, ["train", str(recipe_file), "schedule.epochs=1", "--out", "here"])
    best = runner.invoke(app, ["eval", "here/best", "--data", "held_out=500"])
    assert best.exit_code == 0, best.output
    assert "500 of 1,797" in best.output
    treeify.save(treeify.load("here/last"), "saved")
    assert isinstance(runner.invoke(app, ["eval", "saved"]).exception, RecipeError)
    assert isinstance(runner.invoke(app, ["eval", "nowhere"]).exception, CheckpointError)
    other = runner.invoke(app, ["eval", "saved", "--data", "name=digits", "--json"])
    assert json.loads(other.output)["split"].startswith("360 of 1,797")


def test_eval_gives_every_figure_as_table_json_and_csv(recipe_file: Path) -> None:
    train(load_recipe(recipe_file, ["schedule.epochs=1"]), out=Path("here"))
    shown = CliRunner().invoke(app, ["eval", "here", "--json", "--csv", "scores.csv"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    hne = treeify.load("here/last").eval()
    images = load_recipe(recipe_file).data.load()
    x = images.held_out[0][0][None]
    with torch.no_grad():
        parts = [(hne(x), y) for x, y, *_ in held_out_loader(images.held_out, 300)]
    logits, target = (torch.cat(part) for part in zip(*parts, strict=True))
    right = logits.argmax(2) == target[:, None]
    single = (100 * right.double().mean(0)).tolist()
    assert found["leaf_accuracy"] == pytest.approx(single)
    with Path("scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    base, first, alone = lines[0], lines[1:4], lines[4:]
    assert (base["kind"], base["accuracy"], base["macs"]) == ("base", "", str(hne.count_macs(1)))
    assert {line["kind"] for line in alone} == {"single"}
    for row, line, leaves in zip(found["scores"], first, (1, 2, 4), strict=True):
        mean = logits[:, :leaves].mean(1)
        expected = {
            "leaves": leaves,
            "accuracy": 100 * (mean.argmax(1) == target).double().mean().item(),
            "nll": F.cross_entropy(mean, target).item(),
            "logit_std": logits[:, :leaves].std(1, correction=0).mean().item(),
            "macs": hne.count_macs(leaves),
            "parameters": hne.count_parameters(leaves),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-4), key
        assert line == {
            "kind": "first",
            **{key: "" if value is None else str(value) for key, value in row.items()},
        }
    for row in found["scores"]:  # loosely: other tests run beside this one
        own = Timer("hne.predict(x, leaves=n)", globals={"hne": hne, "x": x, "n": row["leaves"]})
        milliseconds = 1e3 * own.timeit(20).median
        assert milliseconds / 8 < row["milliseconds"] < 8 * milliseconds
    assert [float(line["accuracy"]) for line in alone] == pytest.approx(single)
    assert [line["leaves"] for line in alone] == ["0", "1", "2", "3"]
    larger = CliRunner().invoke(
        app, ["eval", "here", "--json", "--no-latency", "--data", "size=16"]
    )
    scored = json.loads(larger.output)["scores"]
    assert [own["macs"] for own in scored] == [
        own.macs for own in costs(hne, torch.zeros(1, 3, 16, 16))
    ]
    table = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["eval", "here"]).output
    for heading in ("ECE %", "logit std", " ms", "NLL", f"{found['scores'][2]['accuracy']:.2f}"):
        assert heading in table, heading
    assert ", ".join(f"{value:.2f}" for value in single) in table
