"""Which images a step gets, and what happens to those that cannot be read."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runner
import runs
import torch

import treeify
from treeify.errors import DataError
from treeify.training.loaders import Batch, Order, TimedBatches, check_skipped, seed_of
from treeify.training.recipe import Recipe
from treeify.training.run_directory import state_name
from treeify.training.trainer import train


@pytest.mark.parametrize("images", [1, 7, 96, 100])
@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (3, 2)])
def test_processes_divide_every_step(images: int, processes: int, parts: int) -> None:
    alone = Order(images, 16, 3)
    orders = [
        Order(images, 16, 3, process=process, processes=processes, parts=parts)
        for process in range(processes)
    ]
    assert len({len(list(order)) for order in orders}) == 1
    batches = [iter(order) for order in orders]
    for step, expected in enumerate(alone):
        draws, weight = [], 0.0
        for process, order in enumerate(orders):
            for part in range(order.parts_of(step)):
                weight += order.weight(step, part)
                batch = next(batches[process])
                assert batch
                if order.weight(step, part):
                    draws += batch
        assert sorted(draws) == sorted(expected)
        assert weight == pytest.approx(1)
    assert sorted(draw.image for batch in alone for draw in batch) == list(range(images))


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (1, 4), (2, 1), (3, 2)])
@pytest.mark.parametrize("images", [2, 3, 17, 18, 33, 48, 49])
def test_no_batch_has_fewer_images_than_asked_for(images: int, processes: int, parts: int) -> None:
    seen = []
    for process in range(processes):
        order = Order(images, 16, 3, process=process, processes=processes, parts=parts, fewest=2)
        batches = iter(order)
        for step in range(order.steps):
            for part in range(order.parts_of(step)):
                batch = next(batches)
                if weight := order.weight(step, part):
                    assert len(batch) >= 2
                    assert len(batch) == round(weight * order.size(step))
                    seen += [draw.image for draw in batch]
        assert next(batches, None) is None
        assert order.smallest >= 2
    assert sorted(seen) == list(range(images))


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


def test_only_the_time_spent_waiting_for_batches_counts() -> None:
    def slow() -> Iterator[Batch]:
        for _ in range(2):
            time.sleep(0.02)
            yield Batch(torch.empty(0), torch.empty(0), ())

    batches = TimedBatches(slow())
    time.sleep(0.5)
    assert len(list(batches)) == 2
    assert 0.04 <= batches.seconds < 0.5


def test_as_many_images_may_be_unreadable_as_the_recipe_says() -> None:
    paths = {f"{index}.png" for index in range(7)}
    check_skipped(paths, 7)
    with pytest.raises(DataError, match=r"(?s)7 images.*at most 6.*0.png, .*, 4.png and 2 more"):
        check_skipped(paths, 6)


def damaged_photos(folder: Path, damaged: int) -> None:
    """Photos of which so many of each part's dark ones cannot be read."""
    runs.photos(folder)
    for part in ("train", "val"):
        for index in range(damaged):
            file = folder / part / "dark" / f"{index}.png"
            file.write_bytes(file.read_bytes()[:40])


def on_photos(tmp_path: Path, *overrides: str) -> Recipe:
    return runs.recipe(
        tmp_path,
        "data.name=image_folder",
        f"data.root={tmp_path / 'photos'}",
        "data.size=8",
        "data.crop_padding=1",
        "model.kwargs.num_classes=2",
        "batch_size=8",
        "schedule.epochs=1",
        *overrides,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_counted_and_limited(tmp_path: Path, workers: int) -> None:
    damaged_photos(tmp_path / "photos", damaged=2)
    recipe = on_photos(tmp_path, "skip_corrupt=4", f"workers={workers}")
    result = train(recipe, out=tmp_path / "run")
    assert result.last is not None and result.last.skipped == 4
    few = on_photos(tmp_path, "skip_corrupt=3", f"workers={workers}")
    with pytest.raises(DataError, match=r"(?s)4 images cannot be read.*at most 3.*0\.png"):
        train(few, out=tmp_path / "other")
    none = on_photos(tmp_path, f"workers={workers}")
    with pytest.raises(DataError, match=r"(?s)1 image cannot be read.*/[01]\.png"):
        train(none, out=tmp_path / "third")
    shown = runner.run("eval", str(tmp_path / "run"), "--no-latency", "--json")
    assert len(json.loads(shown.output)["skipped"]) == 2
    least = treeify.load(tmp_path / "run" / "last").count_macs(1)
    wanted = ("--target-macs", str(least), "--no-tune", "--repeats", "10")
    shown = runner.run("calibrate", str(tmp_path / "run"), *wanted)
    assert shown.exit_code == 0, shown.output
    assert "Not read, and left out: " in shown.output


DEADLY = """\
import multiprocessing, os, signal
from torch.nn import functional as F

calls = []


def deadly(logits, target, tree):
    calls.append(None)
    for worker in multiprocessing.active_children() if len(calls) == 3 else []:
        os.kill(worker.pid, signal.SIGKILL)
    return F.cross_entropy(logits.mean(1), target)
"""


@pytest.mark.thorough
def test_a_dead_worker_ends_in_one_message(tmp_path: Path) -> None:
    runs.photos(tmp_path / "photos")
    (tmp_path / "mortal.py").write_text(DEADLY)
    on_photos(tmp_path, "workers=1", "schedule.epochs=9", "checkpoints.minutes=1e-9")
    done = runs.run("tiny.yaml", "loss.name=mortal:deadly", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    for text in ("LostProcessError", "DataLoader worker", "--resume run"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "last").resolve().name == state_name(2, 1)
