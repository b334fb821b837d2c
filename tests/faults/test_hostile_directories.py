"""Somebody's directory runs nothing, fetches nothing and opens nothing outside of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from PIL import Image

import treeify
from treeify.models.architecture import Architecture

TESTS = Path(__file__).parents[1]
# What is harmless once its arguments or keys are passed over.
LOADED = {*hostile.DROPPED, "run loss", "run weights", "run teacher"}
WAYS = ["load", "predict", "eval", "calibrate", "weights", "teacher"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads").resolve()


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[tuple[str, str], Any]:
    """What came of every directory, by its name and the way it was loaded."""
    hne = treeify.hierarchicalize(
        Architecture(hostile.NAME, {"num_classes": 3}),
        hostile.SPLITS,
        init="fresh",
        example_input=torch.zeros(1, 3, 32, 32),
    )
    treeify.save(hne, folder / "harmless")
    hostile.unseal(folder / "harmless")
    names = hostile.write(folder, folder / "harmless", TESTS / "saved/run")
    Image.new("RGB", (32, 32)).save(folder / "image.png")
    process = subprocess.run(
        [
            *(sys.executable, str(Path(hostile.__file__)), str(folder)),
            *(json.dumps(["harmless", *names]), "image.png", json.dumps(WAYS)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TREEIFY_TUNE_ALLOCATOR": "0",  # it calls the system's library
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["peak"] < 3 * 2**20  # kB
    return {(row["name"], row["way"]): row for row in result["report"]}


def test_there_are_enough_of_them(report: dict[tuple[str, str], Any]) -> None:
    assert len({name for name, _ in report}) > 50


def test_nothing_runs_or_leaves_the_folder(
    report: dict[tuple[str, str], Any], folder: Path
) -> None:
    events = {key: row["events"] for key, row in report.items() if row["events"]}
    assert events == {}
    assert not (folder / hostile.MARKER).exists()
    assert (folder / "victim/config.json").is_file()


def test_each_is_refused_in_a_message_or_loads_without_what_it_asked_for(
    report: dict[tuple[str, str], Any],
) -> None:
    outcomes = {key: (row["outcome"], row["message"]) for key, row in report.items()}
    unlike = {
        (name, way): outcome
        for (name, way), outcome in outcomes.items()
        if outcome[0] != ("loaded" if name in {*LOADED, "harmless"} else "refused")
    }
    assert unlike == {}


def test_none_takes_long(report: dict[tuple[str, str], Any]) -> None:
    slow = {key: row["seconds"] for key, row in report.items() if row["seconds"] > 10}
    assert slow == {}


@pytest.mark.parametrize("way", WAYS)
def test_the_message_says_what_would_be_imported_and_how_to_allow_it(
    report: dict[tuple[str, str], Any], way: str
) -> None:
    message = report["shell", way]["message"]
    assert "names a function of its own: 'os:system' would be imported and called" in message
    assert "trust=True (--trust)" in message
