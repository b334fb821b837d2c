"""`treeify eval --per-class` and `--confusion`: counts that scikit-learn gives, too."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runner import run
from sklearn.metrics import confusion_matrix, recall_score

import treeify
from treeify.cli.classes import check_confusion, class_rows, class_table, confusion_text
from treeify.cli.output import say
from treeify.evaluation.classes import NamedClasses
from treeify.training.recipe_file import data_recipe
from treeify.tree import Tree

DATA = ("--data", "name=digits", "--no-latency")
EVIL = ("[red]zero[/red]", "o\x1b[31mne", "=1+1,\n2")


def answers(hne: treeify.HierarchicalEnsemble, leaves: int) -> tuple[list[int], list[int]]:
    held_out: Any = data_recipe(["name=digits"]).load().held_out
    images, classes = zip(*held_out, strict=True)
    with torch.no_grad():
        named = hne.eval()(torch.stack(images))[:, :leaves].mean(1).argmax(1)
    return [int(label) for label in classes], named.tolist()


@pytest.mark.parametrize("directory", ["run", "alone", "exported/run"])
def test_runs_ensembles_and_exports_are_counted(hne: Any, exported: Path, directory: str) -> None:
    options = ("--per-class", "--json", "--confusion", "confusion.json")
    trust = () if directory.startswith("exported") else ("--trust",)
    result = run("eval", directory, *DATA, *options, *trust)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for leaves in (1, 3, 6):
        labels, named = answers(hne, leaves)
        recall = recall_score(labels, named, average=None)
        accuracies = [row["accuracy"][str(leaves)] for row in found["per_class"]]
        assert accuracies == pytest.approx(100 * recall)
    assert [row["images"] for row in found["per_class"]] == torch.tensor(labels).bincount().tolist()
    assert [(row["class"], row["label"]) for row in found["per_class"]] == [
        (digit, str(digit)) for digit in range(10)
    ]
    written = json.loads(Path("confusion.json").read_text("utf-8"))
    assert written["counts"] == confusion_matrix(labels, named).tolist()
    assert written["leaves"] == 6
    assert written["classes"] == [str(digit) for digit in range(10)]
    assert written["split"] == found["split"]


def test_a_table_and_a_csv_file_of_one_size(hne: Any, directories: Path) -> None:
    plain = run("eval", "run", "--trust", *DATA, "--json")
    assert json.loads(plain.stdout)["per_class"] is None
    result = run(
        *("eval", "run", "--trust", *DATA, "--per-class"),
        *("--confusion", "confusion.csv", "--confusion-leaves", "3"),
    )
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())  # a caption is as wide as its table
    assert "accuracy % on the images of each class, by leaves" in words
    assert "Confusion by 3 of the leaves is in confusion.csv" in result.stdout
    with Path("confusion.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    labels, named = answers(hne, 3)
    assert head == ["true class; columns: named by 3 leaves", *map(str, range(10))]
    assert [row[0] for row in rows] == head[1:]
    counts = [[int(count) for count in row[1:]] for row in rows]
    assert counts == confusion_matrix(labels, named).tolist()
    recall = recall_score(labels, named, average=None)
    assert f"{100 * recall[4]:.2f}" in result.stdout


BAD = {
    "no ending": (("--confusion", "confusion"), ".csv or .json", "confusion.csv"),
    "another ending": (("--confusion", "confusion.png"), ".csv or .json", "Found .png"),
    "no directory": (("--confusion", "nowhere/confusion.csv"), "--confusion", "nowhere"),
    "no file": (("--confusion-leaves", "3"), "--confusion FILE", "--confusion-leaves 3"),
    "no size": (("--confusion", "c.csv", "--confusion-leaves", "2"), "1, 3, 6", "no size"),
    "one file": (("--confusion", "c.csv", "--csv", "./c.csv"), "both", "c.csv"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
@pytest.mark.parametrize("directory", ["run", "exported/run"])
def test_what_cannot_be_written_is_refused_first(exported: Path, directory: str, case: str) -> None:
    options, *words = BAD[case]
    before = sorted(Path().rglob("*"))
    result = run("eval", directory, *DATA, "--trust", *options)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr
    assert sorted(Path().rglob("*")) == before


def test_names_of_classes_are_no_markup_and_nothing_a_terminal_obeys(tmp_path: Path) -> None:
    classes = NamedClasses(Tree((2,)), 4)
    classes.add(torch.eye(4)[:3, None].expand(-1, 2, -1), torch.tensor([0, 1, 1]))
    names = (*EVIL, "never")
    rows = class_rows(classes, names, (1, 2))
    file = io.StringIO()
    say(Console(file=file, width=80, force_terminal=True, color_system=None), class_table(rows))
    shown = file.getvalue()
    assert "[red]zero[/red]" in shown
    assert "\x1b[31m" not in shown
    assert " 50.00 " in shown
    assert " - " in shown  # no image is of the last two
    origin = {"ensemble": "here", "split": "three"}
    text = confusion_text(Path("c.csv"), classes, names, 1, origin)
    head, *lines = csv.reader(io.StringIO(text))
    assert head == ["true class; columns: named by 1 leaf", EVIL[0], "o\\x1b[31mne", *names[2:]]
    assert [line[1:] for line in lines][:2] == [["1", "0", "0", "0"], ["0", "1", "1", "0"]]
    assert json.loads(confusion_text(Path("c.JSON"), classes, names, None, origin)) == {
        **origin,
        "leaves": 2,
        "rows": "true classes",
        "columns": "named classes",
        "classes": list(names),
        "counts": [[1, 0, 0, 0], [0, 1, 1, 0], [0] * 4, [0] * 4],
    }
    check_confusion(tmp_path / "c.JSON", None, None)
