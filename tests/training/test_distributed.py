"""Two processes compute what one computes."""

from pathlib import Path

import norms
import pytest
import runs
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from treeify.training.loaders import Order, seed_of
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
    own = ("model.name=normless:net", "model.kwargs={}", "model.splits=['3']")
    for parts in (1, 15):  # more than the last step has images
        recipe = runs.recipe(tmp_path, *EXACT, *own, f"gradient_accumulation={parts}")
        train(recipe, out=tmp_path / f"parts{parts}")
    assert_same_steps(tmp_path / "parts1", tmp_path / "parts15")
    file = runs.written(tmp_path, *EXACT, *own, "gradient_accumulation=4")
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


@pytest.mark.parametrize("images", [1, 7, 96, 100])
@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (3, 2)])
def test_shares_make_up_every_step(images: int, processes: int, parts: int) -> None:
    whole = Order(images, 16, 3)
    shares = [
        Order(images, 16, 3, process=process, processes=processes, parts=parts)
        for process in range(processes)
    ]
    steps = [list(share) for share in shares]
    for step, expected in enumerate(whole):
        found, weight = [], 0.0
        for process, share in enumerate(shares):
            for part in range(parts):
                weight += share.weight(step, part)
                batch = steps[process][step * parts + part]
                assert batch
                if share.weight(step, part):
                    found += batch
        assert sorted(found) == sorted(expected)
        assert weight == pytest.approx(1)
    assert sorted(draw.image for batch in whole for draw in batch) == list(range(images))


def test_the_order_depends_on_seed_and_epoch_and_can_begin_anywhere() -> None:
    order = Order(100, 16, 3)
    first = list(order)
    assert list(order) == first
    order.start = 4
    assert list(order) == first[4:]
    assert len(order) == len(first) - 4
    order.start, order.epoch = 0, 1
    assert [draw.image for draw in next(iter(order))] != [draw.image for draw in first[0]]
    assert list(Order(100, 16, 4)) != first
    assert seed_of("a", 1) != seed_of("a", 2)


def test_batch_norms_of_uneven_shares_equal_one_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(norms.of_a_share, (runs.free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, weight, bias, mean, var = norms.images_and_norm()
    x.requires_grad_()
    out = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
    (out * out.detach().cos()).sum().backward()
    assert_close(torch.cat([first["out"], second["out"]]), out.detach())
    assert_close(torch.cat([first["grad"], second["grad"]]), x.grad)
    for name, whole in (("weight", weight.grad), ("bias", bias.grad)):
        assert_close(first[name] + second[name], whole)
    for own in (first, second):
        assert_close(own["mean"], mean)
        assert_close(own["var"], var)
