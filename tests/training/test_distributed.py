"""Two processes compute what one computes."""

from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from treeify.training.run_directory import state_name
from treeify.training.trainer import train

EXACT = (
    "precision=fp64",
    "data.crop_padding=0",
    "mix=null",
    "checkpoints.minutes=1e-9",
    "checkpoints.keep=99",
)


def states(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(run.glob("checkpoints/*/model.safetensors"))]


def assert_same_steps(one: Path, other: Path) -> None:
    first, second = states(one), states(other)
    assert len(first) == len(second) == 2 * runs.STEPS
    for step, (left, right) in enumerate(zip(first, second, strict=True), start=1):
        for key, value in left.items():
            assert_close(right[key], value, rtol=1e-7, atol=1e-9, msg=f"step {step}, {key}")


def test_two_processes_take_the_same_steps_as_one(tmp_path: Path) -> None:
    file = runs.written(tmp_path, *EXACT)
    done = runs.run(file, "--out", "two", cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("epoch 2/2") == 1
    train(runs.load_recipe(file), out=tmp_path / "one")
    assert_same_steps(tmp_path / "one", tmp_path / "two")


def test_parts_of_a_step_add_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "normless.py").write_text(runs.NORMLESS)
    normless = ("model.name=normless:net", "model.kwargs={}", "model.splits=['3']")
    for parts in (1, 15):  # more than the last step has images
        recipe = runs.recipe(tmp_path, *EXACT, *normless, f"gradient_accumulation={parts}")
        train(recipe, out=tmp_path / f"parts{parts}")
    assert_same_steps(tmp_path / "parts1", tmp_path / "parts15")
    file = runs.written(tmp_path, *EXACT, *normless, "gradient_accumulation=4")
    assert runs.run_in_two(file, "--out", "both", cwd=tmp_path) == [0, 0]
    assert_same_steps(tmp_path / "parts1", tmp_path / "both")


def test_an_image_that_weighs_nothing_leaves_no_trace_in_batch_norms(tmp_path: Path) -> None:
    """The last step has one image, which one of the two processes gets."""
    one_left = ("data.held_out=1500", "batch_size=148")
    file = runs.written(tmp_path, *EXACT, *one_left)
    assert runs.run_in_two(file, "--out", "two", cwd=tmp_path) == [0, 0]
    train(runs.load_recipe(file), out=tmp_path / "one")
    assert len(states(tmp_path / "one")) == 2 * 3
    for left, right in zip(states(tmp_path / "one"), states(tmp_path / "two"), strict=True):
        for key, value in left.items():
            assert_close(right[key], value, rtol=1e-7, atol=1e-9, msg=key)


LOSS = """\
import os
import torch.distributed as dist
from torch.nn import functional as F

calls = []


def dying(logits, target, tree):
    calls.append(None)
    if dist.get_rank() == 1 and len(calls) == 6:
        os._exit(9)
    return F.cross_entropy(logits.mean(1), target)
"""


@pytest.mark.thorough
def test_a_lost_process_ends_the_run_which_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "mortal.py").write_text(LOSS)
    file = runs.written(tmp_path, *EXACT)
    overrides = ["loss.name=mortal:dying"]
    # Not by torchrun, which may end the process that is left before that can say so.
    left, lost = runs.told_apart(file, *overrides, "--out", "run", cwd=tmp_path)
    assert lost.returncode == 9
    assert left.returncode != 0
    assert "a process of this run died" in left.stdout
    assert (tmp_path / "run" / "last").resolve().name == state_name(5, 1)
    source = (tmp_path / "mortal.py").read_text()
    (tmp_path / "mortal.py").write_text(source.replace("== 6", "== 99"))
    arguments = [file, *overrides]
    assert runs.run_in_two(*arguments, "--resume", "run", cwd=tmp_path) == [0, 0]
    assert runs.run_in_two(*arguments, "--out", "whole", cwd=tmp_path) == [0, 0]
    runs.assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_what_stops_the_first_process_stops_all(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    file = runs.written(tmp_path)
    assert runs.run_in_two(file, "--out", "taken", cwd=tmp_path) == [2, 2]
    assert runs.run_in_two("--resume", "taken", cwd=tmp_path) == [2, 2]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]
