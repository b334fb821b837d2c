"""What does the trainer cost beside the training step itself?

`python benchmarks/trainer.py` trains with the CIFAR recipes' settings on random images that go
through their augmentation, and with the digits recipe. After every step of the trainer a bare step
runs: forward, loss, backward and SGD on a batch that is there already. `overhead_%` is what the
trainer takes beyond it, loading aside; `waiting_%` the share of the training time spent waiting for
images, measured in a run without bare steps.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import common
import torch
from PIL import Image

from treeify import losses
from treeify.data.small import CIFAR100
from treeify.data.source import Data, Transformed, augmentation, prepare
from treeify.progress import Epoch, Plan, Reporter, Step
from treeify.recipe import Recipe
from treeify.recipe_file import load_recipe
from treeify.trainer import train

RECIPES = Path(__file__).parents[1] / "recipes"
COLUMNS = ("trainer", "bare", "overhead_%", "waiting_%", "workers")


def random_images(*, count: int, classes: int = 100) -> Data:
    """Random 32x32 images, augmented and normalised as the CIFAR recipes do."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    pictures = [Image.fromarray(own.numpy()) for own in pixels]
    examples = [(pictures[index % 64], index % classes) for index in range(count)]
    crop = prepare(CIFAR100, *augmentation(32, 4, True))
    names = tuple(map(str, range(classes)))
    held_out = Transformed(examples[:classes], prepare(CIFAR100))
    return Data(Transformed(examples, crop), held_out, names, "random images")


class Bare(Reporter):
    """Times the trainer's steps, and a bare one after each."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.trainer: list[float] = []
        self.bare: list[float] = []
        self.waiting = 0.0

    def started(self, plan: Plan) -> None:
        """Prepare a step of its own."""
        self.hne = copy.deepcopy(plan.hne).train()
        rule = self.recipe.optimizer
        self.optimizer = torch.optim.SGD(
            self.hne.parameters(),
            lr=1e-3,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
        )
        count, shape = self.recipe.batch_size, plan.data.example().shape
        self.images = torch.randn(count, *shape)
        self.target = torch.zeros(count, dtype=torch.long)
        self.since = time.perf_counter()

    def stepped(self, step: Step) -> None:
        """One step is done."""
        now = time.perf_counter()
        self.trainer.append(now - self.since)
        self.optimizer.zero_grad()
        logits = self.hne(self.images)
        losses.hierarchical_distillation(logits, self.target, self.hne.tree).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.since = time.perf_counter()
        self.bare.append(self.since - now)

    def finished_epoch(self, epoch: Epoch) -> None:
        """Seconds spent waiting, of all of them."""
        self.waiting = epoch.waiting * sum((*self.trainer, *self.bare))


class Waiting(Reporter):
    """Hears how long the trainer waited."""

    share = 0.0

    def finished_epoch(self, epoch: Epoch) -> None:
        """Keep the last."""
        self.share = epoch.waiting


def measure(report: common.Report, name: str, file: str, steps: int, workers: int) -> None:
    """One row."""
    if not report.wanted(name):
        return
    common_settings = ["schedule.epochs=1", "tune=false", "threads=null"]
    recipe = load_recipe(RECIPES / file, common_settings)
    if file.startswith("cifar"):
        count = steps * recipe.batch_size
        data = ["data.name=trainer:random_images", f"data.count={count}"]
        recipe = load_recipe(RECIPES / file, [*common_settings, *data])
    alone = recipe.model_copy(update={"workers": 0})
    beside = recipe.model_copy(update={"workers": workers})
    bare, waiting = Bare(alone), Waiting()
    with tempfile.TemporaryDirectory() as folder:
        train(alone, out=Path(folder) / "bare", reporter=bare)
        train(beside, out=Path(folder) / "waiting", reporter=waiting)
    # The first step warms both up.
    computing = sum(bare.trainer[1:]) - bare.waiting * (len(bare.bare) - 1) / len(bare.bare)
    report.add(
        name,
        trainer=common.milliseconds(bare.trainer[1:]),
        bare=common.milliseconds(bare.bare[1:]),
        **{
            "overhead_%": 100 * (computing / sum(bare.bare[1:]) - 1),
            "waiting_%": 100 * waiting.share,
        },
        workers=workers,
        seconds={"trainer": common.spread(bare.trainer[1:]), "bare": common.spread(bare.bare[1:])},
    )


def main() -> None:
    """Measure what is asked for and print the table."""
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    report = common.Report("trainer", COLUMNS, options)
    measure(report, "digits_hne", "digits_hne.yaml", 22, 0)
    measure(report, "cifar_resnet_hne_small", "cifar_resnet_hne_small.yaml", 12, 1)
    measure(report, "cifar_resnet_hne", "cifar_resnet_hne.yaml", 12, 1)
    report.show()


if __name__ == "__main__":
    main()
