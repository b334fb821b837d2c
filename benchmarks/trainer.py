"""What does the trainer cost beside the training step itself?

`python benchmarks/trainer.py` trains with the CIFAR recipes' settings on random images that go
through their augmentation, and with the digits recipe. After every step of the trainer a step of a
bare loop runs: the next batch of a loader of its own, forward, loss, backward and SGD.
`overhead_%` is what the trainer's median step takes beyond the bare one's, with waiting for images
left out of both; `waiting_%` the share of the training time spent waiting for images, measured in a
run without bare steps.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import common
import torch
from PIL import Image

from treeify import losses
from treeify.data.augmentation import Padded
from treeify.data.conventions import of_small_images
from treeify.data.data_set import Data, Transformed
from treeify.training.events import Epoch, Reporter, RunSize, Step
from treeify.training.loaders import Batch, Order, training_loader
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

RECIPES = Path(__file__).parents[1] / "recipes"
COLUMNS = ("trainer", "bare", "overhead_%", "waiting_%", "workers")


def random_images(*, count: int, classes: int = 100) -> Data:
    """Random 32x32 images, augmented and normalised as the CIFAR recipes do."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    pictures = [Image.fromarray(own.numpy()) for own in pixels]
    examples = [(pictures[index % 64], index % classes) for index in range(count)]
    preparation = of_small_images("cifar100", 32, 3)
    augment = Padded(preparation, 4, flip=True)
    names = tuple(map(str, range(classes)))
    held_out = Transformed(examples[:classes], preparation)
    return Data(Transformed(examples, augment), held_out, names, "random images", preparation)


class Timed:
    """A loader that notes how long each of its batches was waited for, in seconds."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.seconds.append(time.perf_counter() - begin)
            if batch is None:
                return
            yield batch


class Bare(Reporter):
    """Times the trainer's steps, and a bare one after each; both without their loading."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.trainer: list[float] = []
        self.bare: list[float] = []
        self.timed = Timed(())

    def loader(self, *args: Any, **options: Any) -> Timed:
        """The trainer's, timed."""
        self.timed = Timed(training_loader(*args, **options))
        return self.timed

    def started(self, run: RunSize) -> None:
        """Prepare a step of its own."""
        self.hne = copy.deepcopy(run.hne).train()
        rule = self.recipe.optimizer
        self.optimizer = torch.optim.SGD(
            self.hne.parameters(),
            lr=1e-3,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
        )
        order = Order(len(run.data.train), self.recipe.batch_size, seed=1)  # type: ignore[arg-type]
        loader = training_loader(run.data, order)
        self.batches = (batch for _ in itertools.count() for batch in loader)
        self.since = time.perf_counter()

    def stepped(self, step: Step) -> None:
        """One step is done."""
        self.trainer.append(time.perf_counter() - self.since - self.timed.seconds[-1])
        images, target, _ = next(self.batches)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.hne(images)
        losses.hierarchical_distillation(logits, target, self.hne.tree).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.since = time.perf_counter()
        self.bare.append(self.since - begin)

    def finished_epoch(self, epoch: Epoch) -> None:
        """The next one's first step begins."""
        self.since = time.perf_counter()


class Waiting(Reporter):
    """Hears how long the trainer waited."""

    share = 0.0

    def finished_epoch(self, epoch: Epoch) -> None:
        """Keep the last."""
        self.share = epoch.waiting


def measure(report: common.Report, name: str, file: str, length: int, workers: int) -> None:
    """One row, of so many steps of a CIFAR recipe or epochs of a small one."""
    if not report.wanted(name):
        return
    settings = ["tune=false", "threads=null"]
    if file.startswith("cifar"):
        count = length * load_recipe(RECIPES / file, []).batch_size
        settings += ["data.name=trainer:random_images", f"data.count={count}", "schedule.epochs=1"]
    else:
        settings += [f"schedule.epochs={length}"]
    recipe = load_recipe(RECIPES / file, settings)
    alone = recipe.model_copy(update={"workers": 0})
    beside = recipe.model_copy(update={"workers": workers})
    bare, waiting = Bare(alone), Waiting()
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch("treeify.training.loaders.training_loader", bare.loader):
            train(alone, out=Path(folder) / "bare", reporter=bare)
        train(beside, out=Path(folder) / "waiting", reporter=waiting)
    # The first step warms both up.
    times = {"trainer": bare.trainer[1:], "bare": bare.bare[1:]}
    report.add(
        name,
        **{way: common.milliseconds(seconds) for way, seconds in times.items()},
        **{
            "overhead_%": 100 * (median(times["trainer"]) / median(times["bare"]) - 1),
            "waiting_%": 100 * waiting.share,
        },
        workers=workers,
        seconds={way: common.spread(seconds) for way, seconds in times.items()},
    )


def main() -> None:
    """Measure what is asked for and print the table."""
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    report = common.Report("trainer", COLUMNS, options)
    measure(report, "digits_hne", "digits_hne.yaml", 5, 0)
    measure(report, "cifar_resnet_hne_small", "cifar_resnet_hne_small.yaml", 12, 1)
    measure(report, "cifar_resnet_hne", "cifar_resnet_hne.yaml", 12, 1)
    report.show()


if __name__ == "__main__":
    main()
