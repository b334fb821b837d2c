"""A metrics file that something happened to: a run goes on, and no good line is lost."""

import codecs
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import runs

from treeify.errors import CheckpointError
from treeify.evaluation.metrics import Score
from treeify.training import metrics_file
from treeify.training.ablation import GridRun, last_epoch
from treeify.training.events import Epoch
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import RunDirectory
from treeify.training.trainer import train

SCORES = tuple(Score(leaves, 50.0, 1.5, 3.0, 0.25) for leaves in (1, 2))
ROWS = [
    json.dumps(asdict(Epoch(number, 4 * number, 1.0, 0.5, 2.25, SCORES, SCORES, 0))).encode()
    for number in range(1, 5)
]
FIRST, SECOND, THIRD, FOURTH = ROWS


def changed(row: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(row), **values}).encode()


def without(row: bytes, key: str) -> bytes:
    return json.dumps(
        {name: value for name, value in json.loads(row).items() if name != key}
    ).encode()


# The second line's place: what stands there cannot be read, and is put aside.
DAMAGES = {
    "cut off": SECOND[:40],
    "zeros": b"\0" * 512,
    "zeros after half a line": SECOND[:40] + b"\0" * 40,
    "binary": bytes(set(range(256)) - {10}),
    "not UTF-8": SECOND.replace(b"epoch", b"\xe9poch"),
    "UTF-16": SECOND.decode().encode("utf-16"),
    "a key is missing": without(SECOND, "held_out"),
    "a number is text": changed(SECOND, loss="2.25"),
    "a number is null": changed(SECOND, step=None),
    "an epoch is a fraction": changed(SECOND, epoch=2.5),
    "an epoch is true": changed(SECOND, epoch=True),
    "an epoch before the first": changed(SECOND, epoch=0),
    "no scores": changed(SECOND, held_out=[]),
    "scores are numbers": changed(SECOND, held_out=[1.0, 2.0]),
    "two lines in one": SECOND + SECOND,
    "a conflict of git": b"<<<<<<< HEAD",
    "another value": b"[1, 2, 3]",
    "nested a million times": b"[" * 1_000_000,
    "a number of a million digits": b'{"epoch": ' + b"1" * 1_000_000,
    "earlier, and here again": FIRST.replace(b"2.25", b"2.5"),
}


def mended(
    file: Path, *lines: bytes, epochs: int = 4
) -> tuple[list[bytes], list[bytes], list[str]]:
    """A file's lines, what was put aside, and the warnings, after going on from an epoch."""
    file.write_bytes(b"\n".join(lines) + b"\n")
    warnings: list[str] = []
    metrics_file.mend(file, epochs, warnings.append)
    aside = file.with_name(metrics_file.DAMAGED)
    removed = aside.read_bytes().split(b"\n")[:-1] if aside.exists() else []
    return file.read_bytes().splitlines(), removed, warnings


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_put_aside_and_the_others_stay(tmp_path: Path, damage: str) -> None:
    line = DAMAGES[damage]
    lines, aside, warnings = mended(tmp_path / "metrics.jsonl", FIRST, line, THIRD, FOURTH)
    repeated = damage == "earlier, and here again"
    assert lines == [line if repeated else FIRST, THIRD, FOURTH]
    assert b"\n".join(aside) == (FIRST if repeated else line.strip())
    assert "1 line of" in warnings[0]
    assert metrics_file.DAMAGED in warnings[0]
    assert "lacks 1 of 4" in warnings[1]


INTACT = {
    "as it was": b"\n".join([*ROWS, b""]),
    "no last newline": b"\n".join(ROWS),
    "empty lines": b"\n\n".join([b"", *ROWS]),
    "of Windows": codecs.BOM_UTF8 + b"\r\n".join(ROWS),
    "in another order": b"\n".join(reversed(ROWS)),
}


@pytest.mark.parametrize("kind", INTACT)
def test_a_file_that_can_be_read_is_not_warned_of(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "metrics.jsonl"
    lines, aside, warnings = mended(file, INTACT[kind])
    assert sorted(line.removeprefix(codecs.BOM_UTF8) for line in lines if line) == sorted(ROWS)
    assert not aside
    assert not warnings
    assert [row.epoch.epoch for row in metrics_file.read_rows(file)[0]] == [1, 2, 3, 4]


def test_keys_of_another_version_stay(tmp_path: Path) -> None:
    more = changed(SECOND, energy=7)
    lines, aside, _ = mended(tmp_path / "metrics.jsonl", FIRST, more, b"?", THIRD, FOURTH)
    assert lines == [FIRST, more, THIRD, FOURTH]
    assert aside == [b"?"]


def test_the_line_that_the_run_writes_again_is_removed(tmp_path: Path) -> None:
    assert mended(tmp_path / "metrics.jsonl", FIRST, SECOND, epochs=1) == ([FIRST], [], [])


def test_more_lines_than_the_state_knows_of_are_put_aside(tmp_path: Path) -> None:
    """As where checkpoints were lost: nobody can know how they came about."""
    lines, aside, warnings = mended(tmp_path / "metrics.jsonl", *ROWS, epochs=0)
    assert (lines, aside) == ([], ROWS)
    assert "4 later than the last state" in warnings[0]
    lines, _, warnings = mended(tmp_path / "metrics.jsonl", FIRST, FOURTH, epochs=1)
    assert lines == [FIRST]
    assert "1 later" in warnings[0]
    assert (tmp_path / f"{metrics_file.DAMAGED}-2").read_bytes() == FOURTH + b"\n"


def a_directory(file: Path) -> None:
    file.mkdir()
    (file / "inside").write_text("mine")


PLACES: dict[str, Callable[[Path], None]] = {
    "a directory": a_directory,
    "a link to nowhere": lambda file: file.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_renamed(tmp_path: Path, place: str) -> None:
    file = tmp_path / "metrics.jsonl"
    PLACES[place](file)
    assert metrics_file.read_rows(file) == ([], [])
    warnings: list[str] = []
    metrics_file.mend(file, 0, warnings.append)
    assert not os.path.lexists(file)
    assert os.path.lexists(tmp_path / metrics_file.DAMAGED)
    assert "is no file" in warnings[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(runs.recipe(folder), out=folder / "run")
    return folder / "run"


class Warned(runs.Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []
        self.warned = self.warnings.append


def test_a_run_goes_on_whatever_is_in_its_metrics(whole: Path, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    run = tmp_path / "run"
    assert train(recipe, out=run, reporter=runs.InterruptAt(runs.STEPS + 1)).interrupted
    (first,) = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\0\xff\n" + first + b"\n" + first[:50])
    reporter = Warned()
    train(recipe, resume=run, reporter=reporter)
    assert "2 lines of" in reporter.warnings[0]
    runs.assert_same_bits(whole, run)
    assert [row.epoch for row in RunDirectory(run).metrics()] == [1, 2]
    assert (run / "metrics.jsonl").read_bytes().splitlines()[0] == first


def test_a_finished_run_without_its_metrics_is_still_finished(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    (run / "metrics.jsonl").unlink()
    recipe = load_recipe(run / "recipe.yaml")
    reporter = Warned()
    result = train(recipe, resume=run, reporter=reporter)
    assert result.last is None
    assert "lacks 2 of 2" in reporter.warnings[0]
    assert last_epoch(GridRun("tiny", 0, recipe, run)) is None


def test_scores_of_another_tree_are_not_the_runs(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    (run / "metrics.jsonl").write_bytes(FIRST + b"\n" + SECOND + b"\n")  # of two sizes, not three
    assert train(load_recipe(run / "recipe.yaml"), resume=run).last is None


def test_a_damaged_environment_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_bytes(b"{\0")
    with pytest.raises(CheckpointError, match=r"environment\.json cannot be read"):
        RunDirectory(tmp_path).environment()
