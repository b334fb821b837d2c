"""Runs that are killed at random, again and again, end with the bits of one that was not."""

import random
import time
from pathlib import Path

import pytest
import runs

from treeify.training.run_directory import RunDirectory
from treeify.training.run_lock import LOCK
from treeify.training.trainer import train


def train_under_fire(
    folder: Path, file: Path, dice: random.Random, longest: float, most: int
) -> int:
    """Train in `folder/run`, killed after random times of up to so many seconds; how often."""
    run, kills = folder / "run", 0
    while True:
        begun = (run / "recipe.yaml").is_file()
        process = runs.forked(
            runs.train_in, folder, *(("--resume", "run") if begun else (file, "--out", "run"))
        )
        process.join(dice.uniform(0, longest) if kills < most else 300)
        if not process.is_alive():
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
        kills += 1


def assert_kills_change_nothing(tmp_path: Path, kills: int, seed: int, *overrides: str) -> None:
    dice = random.Random(seed)
    file = runs.written(tmp_path, "checkpoints.minutes=1e-9", *overrides)
    recipe = runs.load_recipe(file)
    begin = time.monotonic()
    train(recipe, out=tmp_path / "whole")
    longest = 1.0 + time.monotonic() - begin
    done = number = 0
    while done < kills:  # a run may be faster than they
        number += 1
        folder = tmp_path / f"{number}"
        folder.mkdir()
        done += train_under_fire(folder, file, dice, longest, min(kills - done, 10))
        for name in ("last", "best", "last/ema"):
            runs.assert_same_bits(tmp_path / "whole", folder / "run", name)
        rows, expected = (
            [(row.epoch, row.step, row.loss, row.held_out) for row in RunDirectory(run).metrics()]
            for run in (folder / "run", tmp_path / "whole")
        )
        assert rows == expected
        assert not (folder / "run" / LOCK).exists()
        assert not list((folder / "run").rglob(".*"))
    print(f"{done} kills of {number} runs, seed {seed}")


def test_a_run_killed_at_random_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 3, seed=27)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_hundreds_of_kills_change_no_bit(tmp_path: Path, workers: int) -> None:
    assert_kills_change_nothing(tmp_path, 150, workers, f"workers={workers}")
