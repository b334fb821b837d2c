"""Training runs: from a recipe to a trained ensemble, measured after every epoch."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from treeify import losses
from treeify.api import hierarchicalize
from treeify.architecture import Architecture
from treeify.data import Data, loader
from treeify.ensemble import HierarchicalEnsemble
from treeify.errors import RecipeError, TreeifyError
from treeify.metrics import Score, Scores, evaluate
from treeify.recipe import Recipe
from treeify.run_directory import RunDirectory, check_free, new_run, replaced_run


class DivergedError(TreeifyError):
    """The training loss is no longer a number."""


@dataclass(frozen=True)
class Step:
    """One training step, as reported.

    Args:
        epoch: it belongs to, from 1.
        step: number in its epoch, from 1.
        loss: of its batch.
        accuracy: of all leaves on this epoch's training images so far, in percent.
        lr: learning rate it used.
    """

    epoch: int
    step: int
    loss: float
    accuracy: float
    lr: float


@dataclass(frozen=True)
class Epoch:
    """One finished epoch, as reported and as written to `metrics.jsonl`.

    Args:
        epoch: its number, from 1.
        step: training steps since the start of the run.
        seconds: time for training and evaluation.
        loss: mean training loss.
        train: scores on the augmented training images while training, one per nested size.
        held_out: scores on the held-out images afterwards, one per nested size.
    """

    epoch: int
    step: int
    seconds: float
    loss: float
    train: tuple[Score, ...]
    held_out: tuple[Score, ...]


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, as reported.

    Args:
        directory: where the run is written.
        hne: the ensemble to be trained.
        data: what it is trained on.
        epochs: how many.
        steps: training steps per epoch.
        device: where the ensemble is.
    """

    directory: Path
    hne: HierarchicalEnsemble
    data: Data
    epochs: int
    steps: int
    device: torch.device


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Args:
        plan: what it set out to do.
        last: the last finished epoch, None if none was.
        interrupted: Ctrl-C stopped it early; `last/` holds the state it stopped in.
    """

    plan: Plan
    last: Epoch | None
    interrupted: bool


class Reporter:
    """Hears how a run goes; does nothing unless a subclass does."""

    def started(self, plan: Plan) -> None:
        """The first step is next."""

    def stepped(self, step: Step) -> None:
        """A training step is done."""

    def finished_epoch(self, epoch: Epoch) -> None:
        """An epoch is trained, measured and saved."""


def train(
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Train an ensemble from a recipe.

    Ctrl-C (in the main thread) finishes the current step, saves `last` and returns; a second one
    acts at once.

    Args:
        recipe: what to train on what, and how.
        out: run directory, instead of the recipe's.
        overwrite: replace a run that is already in that directory.
        reporter: hears about every step and epoch.

    Returns:
        The trained ensemble, its last scores and where the run is.

    Raises:
        RecipeError: the data and the model have different numbers of classes, or the device is not
            there.
        CheckpointError: the run directory is not empty.
        DataError: the data set cannot be read.
        DivergedError: the loss became infinite or not a number.
    """
    wanted = out or recipe.out
    if wanted is not None:
        check_free(Path(wanted), overwrite=overwrite)
    device = resolve_device(recipe.device)
    with _threads(recipe.threads):
        data = recipe.data.load()
        hne = build(recipe, data).to(device)
        if recipe.channels_last:  # the images follow: convolutions take their weights' layout
            hne = hne.to(memory_format=torch.channels_last)
        directory = new_run(recipe.name) if wanted is None else replaced_run(Path(wanted))
        directory.describe(recipe, device)
        return _Run(recipe, data, hne, device, directory, reporter or Reporter()).fit()


def build(recipe: Recipe, data: Data) -> HierarchicalEnsemble:
    """The untrained ensemble a recipe describes.

    Args:
        recipe: its model section and seed are used.
        data: what the ensemble is for; gives the example image and the number of classes.

    Returns:
        The ensemble, on the CPU.

    Raises:
        RecipeError: the data and the model have different numbers of classes.
    """
    model = recipe.model
    image, _ = data.held_out[0]
    hne = hierarchicalize(
        Architecture(model.name, model.kwargs),
        splits=model.splits,
        fanout=model.fanout,
        init=model.init,
        seed=recipe.seed,
        example_input=image[None],
    )
    check_classes(hne, data)
    return hne


@torch.no_grad()
def check_classes(hne: HierarchicalEnsemble, data: Data) -> None:
    """Raise RecipeError unless the ensemble has one logit for each class of the data."""
    image, _ = data.held_out[0]
    was_training = hne.training
    outputs = hne.eval()(image[None].to(next(hne.parameters()).device), leaves=1).shape[-1]
    hne.train(was_training)
    if outputs != len(data.classes):
        raise RecipeError(
            "the model does not fit the data.",
            expected=f"a model with the data's {len(data.classes)} classes",
            found=f"one with {outputs}",
            next_step=f"Set model.kwargs.num_classes={len(data.classes)}, or its name for it.",
        )


def lr_factor(step: int, *, steps: int, warmup: int) -> float:
    """The share of the full learning rate at a step: linear warm-up, then half a cosine to 0.

    Args:
        step: number of the step, from 0.
        steps: of the whole run.
        warmup: of the warm-up; its last step is the first at the full rate.

    Returns:
        A factor from 0 to 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind in there if there[kind]), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            f"{name!r} is no device.", expected="auto, cpu, cuda, cuda:1 or mps"
        ) from error
    if not there.get(device.type, True) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise RecipeError(
            f"device {name!r} is not there.",
            expected=f"one of cpu{''.join(f', {kind}' for kind in there if there[kind])}",
            next_step="Set device=auto to take the best one there is.",
        )
    return device


class _Run:
    """The state of a training run."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        hne: HierarchicalEnsemble,
        device: torch.device,
        directory: RunDirectory,
        reporter: Reporter,
    ) -> None:
        self.hne, self.device, self.directory, self.reporter = hne, device, directory, reporter
        self.loss = partial(losses.get(recipe.loss.name), **recipe.loss.options)
        batches = partial(loader, batch_size=recipe.batch_size, workers=recipe.workers)
        self.train_batches = batches(data.train, shuffle=True, seed=recipe.seed)
        self.held_out_batches = batches(data.held_out, shuffle=False)
        self.steps = len(self.train_batches)
        schedule, rule = recipe.schedule, recipe.optimizer
        self.optimizer = SGD(hne.parameters(), **rule.model_dump())
        factor = partial(
            lr_factor,
            steps=schedule.epochs * self.steps,
            warmup=round(schedule.warmup_epochs * self.steps),
        )
        self.scheduler = LambdaLR(self.optimizer, factor)
        self.plan = Plan(directory.path, hne, data, schedule.epochs, self.steps, device)
        self.step = 0
        self.best = -1.0
        torch.manual_seed(recipe.seed)  # augmentation and dropout; weights have their own generator

    def fit(self) -> Result:
        """Train all epochs, or until Ctrl-C."""
        last = None
        self.reporter.started(self.plan)
        with _Interrupt() as interrupt:
            for number in range(1, self.plan.epochs + 1):
                epoch = self._epoch(number, interrupt)
                if epoch is None:
                    self._save("last")
                    return Result(self.plan, last, interrupted=True)
                last = epoch
                self._record(epoch)
                self.reporter.finished_epoch(epoch)
        return Result(self.plan, last, interrupted=False)

    def _epoch(self, number: int, interrupt: _Interrupt) -> Epoch | None:
        """Train and measure one epoch; None if interrupted before its end."""
        start = time.perf_counter()
        scores = Scores(self.hne.tree)
        total = 0.0
        self.hne.train()
        for index, (images, target) in enumerate(self.train_batches, start=1):
            lr = float(self.scheduler.get_last_lr()[0])
            value = self._step(images.to(self.device), target.to(self.device), scores)
            total += value * len(images)
            accuracy = scores.result()[-1].accuracy
            self.reporter.stepped(Step(number, index, value, accuracy, lr))
            if interrupt.requested:
                return None
        held_out = evaluate(self.hne, self.held_out_batches, stop=lambda: interrupt.requested)
        if interrupt.requested:
            return None
        seconds = time.perf_counter() - start
        return Epoch(number, self.step, seconds, total / scores.images, scores.result(), held_out)

    def _step(self, images: Tensor, target: Tensor, scores: Scores) -> float:
        logits = self.hne(images)
        loss: Tensor = self.loss(logits, target, self.hne.tree)
        value = loss.item()
        if not math.isfinite(value):
            self._diverged(value)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        scores.add(logits, target)
        return value

    def _diverged(self, loss: float) -> None:
        last = self.directory.path / "last"
        raise DivergedError(
            f"the loss is {loss} in epoch {self.step // self.steps + 1}, "
            f"step {self.step % self.steps + 1}.",
            expected="a finite number",
            found=f"a learning rate of {self.scheduler.get_last_lr()[0]:.3g} in this step",
            next_step="Try a smaller optimizer.lr or a longer schedule.warmup_epochs. "
            + (f"{str(last)!r} holds the last whole epoch." if last.exists() else ""),
        )

    def _record(self, epoch: Epoch) -> None:
        """Write the epoch's metrics and checkpoints."""
        self.directory.append_metrics(epoch)
        accuracy = epoch.held_out[-1].accuracy
        better = accuracy > self.best
        self.best = max(self.best, accuracy)
        self._save("last")
        if better:
            self._save("best")

    def _save(self, name: Literal["last", "best"]) -> None:
        self.directory.save(name, self.hne, self._tensors(), self._counters())

    def _tensors(self) -> dict[str, Tensor]:
        """Momentum by parameter name, and the states of the random generators."""
        generator = self.train_batches.generator
        assert generator is not None
        tensors = {"rng.torch": torch.get_rng_state(), "rng.order": generator.get_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.hne.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"{key}.{name}"] = value.contiguous()
        return tensors

    def _counters(self) -> dict[str, Any]:
        return {
            "epoch": self.step // self.steps,
            "step": self.step,
            "steps_per_epoch": self.steps,
            "best_accuracy": self.best,
            "lr": float(self.scheduler.get_last_lr()[0]),
        }


class _Interrupt:
    """While entered, the first Ctrl-C is a request; the next one does what it did before."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, *_: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
