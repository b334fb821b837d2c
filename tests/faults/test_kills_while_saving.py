"""Processes that save are killed with -9 at random moments; what they leave is whole."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import small
import torch

import treeify
from treeify.anytime.confidence import Budget
from treeify.conversion.saved_config import check_files
from treeify.conversion.saving import save_measurements
from treeify.training.claim import claimed
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import RunDirectory
from treeify.training.run_lock import locked
from treeify.training.state_file import read_state

HERE = Path(__file__).parent


def ensembles() -> list[treeify.HierarchicalEnsemble]:
    """Two that split alike, with other weights."""
    return [small.ensemble(seed=seed) for seed in (0, 1)]


def budget(macs: int) -> Budget:
    return Budget(macs, (1, 2, 3, 6), (0.5, 0.6, 0.7), 0.0, 0.0, (0.0,) * 4, 1)


def _overwriting(path: Path, ready: Any) -> None:
    pair = ensembles()
    ready.set()
    for number in count():
        treeify.save(pair[number % 2], path / "hne", overwrite=True)


def _measuring(path: Path, ready: Any) -> None:
    hne = treeify.load(path / "hne", small.SmallNet())
    ready.set()
    for number in count(max(hne.budgets, default=0) + 1):
        hne.budgets[number] = budget(number)
        save_measurements(hne, path / "hne")


def warn(text: str) -> None:
    """Nobody listens."""


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "epochs": step, "best": None, "momentum": torch.ones(100)}


def _training(path: Path, ready: Any) -> None:
    """Saves one state after the other, of which two are kept."""
    hne, ema = ensembles()
    with locked(path / "run", warn) as lock:
        directory = RunDirectory(path / "run", lock)
        newest = directory.newest(warn)
        first = 1 if newest is None else read_state(newest)["step"] + 1
        ready.set()
        for number in count(first):
            directory.save(hne, ema, state_of(number), keep=2)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A saved ensemble, and a run with an average that has not begun."""
    treeify.save(ensembles()[0], tmp_path / "hne")
    (tmp_path / "hne" / "notes.txt").write_text("mine")
    recipe = load_recipe(HERE / "kills.yaml")
    with claimed(recipe, tmp_path / "run", overwrite=False, warn=warn) as directory:
        directory.describe(recipe, torch.device("cpu"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    yield tmp_path
    for name in ("hne", "run"):
        assert (tmp_path / name / "notes.txt").read_text() == "mine"


def killed(target: Callable[..., None], path: Path, seconds: float) -> None:
    """Let a process save, and kill it so long after it began."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small", "treeify.training.trainer"])
    ready = context.Event()
    process = context.Process(target=target, args=(path, ready))
    process.start()
    assert ready.wait(120)
    time.sleep(seconds)
    assert process.exitcode is None, "it ended by itself"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


@cache
def _answers() -> list[torch.Tensor]:
    return [hne(small.images()).detach() for hne in ensembles()]


def check_overwriting(path: Path, seen: list[Any]) -> None:
    hne = treeify.load(path / "hne", small.SmallNet())
    assert any(torch.equal(hne(small.images()), answer) for answer in _answers())


def check_measuring(path: Path, seen: list[Any]) -> None:
    """What a killed process measured, and every one before it, is there: nothing is lost."""
    budgets = treeify.load(path / "hne", small.SmallNet()).budgets
    assert all(value == budget(number) for number, value in budgets.items())
    assert set(seen[-1] if seen else ()) <= budgets.keys()
    seen.append(set(budgets))


def check_training(path: Path, seen: list[Any]) -> None:
    states = sorted((path / "run" / "checkpoints").glob("step-*"))
    for state in states:  # whatever has its final name is whole
        check_files(state)
        check_files(state / "ema")
        read_state(state)
    warned: list[str] = []
    with locked(path / "run", warned.append) as lock:
        newest = RunDirectory(path / "run", lock).newest(warned.append)
    assert all("metrics.jsonl" in text for text in warned)  # which these processes do not write
    assert newest == (states[-1] if states else None)
    assert newest is None or (path / "run" / "last").resolve() == newest
    seen.append(0 if newest is None else read_state(newest)["step"])
    assert seen == sorted(seen)


KINDS = {
    "overwriting": (_overwriting, check_overwriting),
    "measuring": (_measuring, check_measuring),
    "training": (_training, check_training),
}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_what_is_left_is_whole(place: Path, kind: str, kills: int) -> None:
    target, check = KINDS[kind]
    moments = random.Random(f"{kind} {kills}")
    seen: list[Any] = []
    for _ in range(kills):
        killed(target, place, moments.uniform(0, 0.15))
        check(place, seen)
    # What the dead left is cleared by the next that saves.
    treeify.save(ensembles()[0], place / "hne", overwrite=True)
    hne, ema = ensembles()
    with locked(place / "run", warn) as lock:
        for step in (10_000, 10_001):
            RunDirectory(place / "run", lock).save(hne, ema, state_of(step), keep=2)
    assert len(_names(place / "run" / "checkpoints")) == 2
    names = _names(place / "hne")
    assert names[0] == "config.json"
    assert len(names) == 3
    assert not list((place / "run").rglob(".*"))


def test_drafts_of_the_dead_are_cleared_and_files_of_others_stay(place: Path) -> None:
    hne = place / "hne"
    gone = [
        ".config.json.123-0a1b2c3d",
        ".model.safetensors.4-00000000",
        f".model-{'0' * 32}.safetensors.4-00000000",
        f"model-{'a' * 32}.safetensors",
        f"model.safetensors.{'b' * 32}",
        f"config.json.{'c' * 32}",
    ]
    mine = ["model-00001-of-00002.safetensors", ".config.json", "model.pth", "config.json.old"]
    for name in (*gone, *mine):
        (hne / name).write_text("")
    treeify.save(ensembles()[1], hne, overwrite=True)
    names = _names(hne)
    assert not set(gone) & set(names)
    assert set(mine) <= set(names)
