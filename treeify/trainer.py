"""Training runs: from a recipe to a trained ensemble, measured after every epoch.

One process or several: `torchrun --nproc-per-node 4 -m treeify train RECIPE`, or `accelerate launch
-m treeify train RECIPE`. Every process computes its share of each step's images; the batch size
stays what the recipe says.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from treeify import checkpoint, losses
from treeify.api import hierarchicalize
from treeify.architecture import Architecture
from treeify.batches import Batch, Order, held_out_loader, seed_everything, seed_of, training_loader
from treeify.data import Data
from treeify.ensemble import HierarchicalEnsemble
from treeify.errors import CheckpointError, DataError, RecipeError, TreeifyError
from treeify.interrupt import Interrupt
from treeify.metrics import Score, Scores, measure
from treeify.recipe import LossRecipe, MixRecipe, Recipe, TeacherRecipe
from treeify.run_directory import (
    RunDirectory,
    Saved,
    check_free,
    check_same,
    load_state,
    locked,
    make,
    measured,
    new_path,
    state_name,
)
from treeify.snapshot import like
from treeify.sync import SyncedBatchNorms, is_distributed

_PRECISIONS = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


class DivergedError(TreeifyError):
    """The training loss is no longer a number."""


class LostProcessError(TreeifyError):
    """A loader's worker or another process of the run died."""


@dataclass(frozen=True)
class Step:
    """One training step, as reported.

    Args:
        epoch: it belongs to, from 1.
        step: number in its epoch, from 1.
        loss: of its batch.
        accuracy: of all leaves on this epoch's training images so far, in percent; of this process.
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
        seconds: time for training and evaluation; since the last resumption, if there was one.
        waiting: share of the training time spent waiting for images.
        loss: mean training loss.
        train: scores on the augmented training images while training, one per nested size.
        held_out: scores on the held-out images afterwards, one per nested size.
        skipped: images that could not be read, so far.
    """

    epoch: int
    step: int
    seconds: float
    waiting: float
    loss: float
    train: tuple[Score, ...]
    held_out: tuple[Score, ...]
    skipped: int


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
        processes: how many share the work.
        done: training steps that an earlier part of the run has done.
    """

    directory: Path
    hne: HierarchicalEnsemble
    data: Data
    epochs: int
    steps: int
    device: torch.device
    processes: int
    done: int


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Args:
        plan: what it set out to do.
        last: the last finished epoch, None if none was.
        interrupted: Ctrl-C or a SIGTERM stopped it early; `last/` holds the state it stopped in.
    """

    plan: Plan
    last: Epoch | None
    interrupted: bool


class Reporter:
    """Hears how a run goes, in the main process; does nothing unless a subclass does."""

    def started(self, plan: Plan) -> None:
        """The first step is next."""

    def stepped(self, step: Step) -> None:
        """A training step is done."""

    def finished_epoch(self, epoch: Epoch) -> None:
        """An epoch is trained, measured and saved."""

    def warned(self, message: str) -> None:
        """Something is wrong, but the run goes on."""


def train(
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    resume: Path | str | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Train an ensemble from a recipe.

    Ctrl-C (in the main thread) or SIGTERM finishes the current step, saves `last` and returns; a
    second one acts at once.

    Args:
        recipe: what to train on what, and how.
        out: run directory, instead of the recipe's.
        overwrite: replace a run that is already in that directory.
        resume: go on with the run in this directory, from the last state it saved. On the CPU the
            weights become the same bits as if the run had not been stopped.
        reporter: hears about every step and epoch.

    Returns:
        The trained ensemble, its last scores and where the run is.

    Raises:
        RecipeError: the data and the model have different numbers of classes, the device is not
            there, or the run to resume has another recipe.
        CheckpointError: the run directory is not empty, or a state cannot be written.
        DataError: the data set cannot be read, or too many images cannot.
        DivergedError: the loss became infinite or not a number.
        LostProcessError: a loader's worker or another process died.
    """
    device = resolve_device(recipe.device)
    if not is_distributed():  # one process may use one device after another
        AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=device.type == "cpu")
    reporter = reporter if reporter is not None and state.is_main_process else Reporter()
    if resume is not None:
        directory = RunDirectory(Path(resume))
        check_same(directory, recipe)
    else:
        directory = _chosen_directory(recipe, out or recipe.out, overwrite, state)
    with _threads(recipe.threads), ExitStack() as held:
        if resume is not None and state.is_main_process:
            held.enter_context(locked(directory))
        with state.local_main_process_first():
            data = recipe.data.load()
        saved = None if resume is None else _newest(directory, state, reporter)
        hne = build(recipe, data) if saved is None else saved.hne
        check_classes(hne, data)
        run = _Run(recipe, data, hne, device, directory, reporter)
        if saved is not None:
            run.take(saved.state, saved.ema)
        if resume is None and state.is_main_process:
            make(directory.path).describe(recipe, device)
            held.enter_context(locked(directory))
        with _explained(directory):
            return run.fit()


def leave() -> None:
    """End the connection to the run's other processes, if there are any, before this one ends."""
    if is_distributed():
        dist.destroy_process_group()


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
    image = data.example()
    architecture = Architecture(model.name, model.kwargs)
    base: nn.Module | Architecture = architecture
    if model.pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            base = architecture.build(pretrained=True)
    hne = hierarchicalize(
        base,
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
    image = data.example()
    first = next(hne.parameters())
    was_training = hne.training
    outputs = hne.eval()(image[None].to(first.device, first.dtype), leaves=1).shape[-1]
    hne.train(was_training)
    if outputs != len(data.classes):
        raise RecipeError(
            "the model does not fit the data.",
            expected=f"a model with the data's {len(data.classes)} classes",
            found=f"one with {outputs}",
            next_step=f"Set model.kwargs.num_classes={len(data.classes)}, or its name for it.",
        )


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
    """The state of a training run in one of its processes."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        hne: HierarchicalEnsemble,
        device: torch.device,
        directory: RunDirectory,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.hne, self.directory, self.reporter = recipe, hne, directory, reporter
        self.accelerator = _accelerator(recipe, device, directory)
        self.device = self.accelerator.device
        self.process = self.accelerator.process_index
        self.processes = self.accelerator.num_processes
        hne.to(self.device, torch.float64 if recipe.precision == "fp64" else None)
        images = len(data.train)  # type: ignore[arg-type]
        self.order = Order(
            images,
            recipe.batch_size,
            recipe.seed,
            process=self.process,
            processes=self.processes,
            parts=recipe.gradient_accumulation,
        )
        self.train_batches = training_loader(data, self.order, recipe.workers)
        self.held_out_batches = held_out_loader(
            data.held_out,
            recipe.batch_size,
            workers=recipe.workers,
            process=self.process,
            processes=self.processes,
            skip=recipe.skip_corrupt > 0,
        )
        self.steps = self.order.steps
        self.objective = _Objective(recipe, hne, self.device)
        self.mix = None if recipe.mix is None else _mixing(recipe.mix, len(data.classes))
        self._tune(data)
        self._lay_out()
        self.ema = None
        if recipe.ema is not None:
            self.ema = ModelEmaV3(hne, recipe.ema.decay, use_warmup=recipe.ema.warmup)
        self.optimizer = optimizer = _optimizer(recipe, hne)
        self.scheduler = _scheduler(recipe, optimizer, self.steps)
        self.model = self.accelerator.prepare_model(hne)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.is_synced = recipe.sync_batch_norm and is_distributed()
        self.step = self.epochs = 0
        self.best: str | None = None
        self.best_accuracy = -1.0
        self.skipped: set[str] = set()
        self.total = 0.0
        self.scores = Scores(hne.tree)
        self.data = data
        self.saved = time.monotonic()

    @property
    def _plan(self) -> Plan:
        return Plan(
            self.directory.path,
            self.hne,
            self.data,
            self.recipe.schedule.epochs,
            self.steps,
            self.device,
            self.processes,
            self.step,
        )

    def _tune(self, data: Data) -> None:
        """Measure which way of running is fastest, once for all processes."""
        self.hne.execution = self.recipe.execution
        if not self.recipe.tune or self.hne.tunings:
            return
        image = data.example()
        self._lay_out()  # what it is compared with
        count = max(1, self.recipe.batch_size // (self.processes * self.order.parts))
        first = next(self.hne.parameters())
        x = image[None].expand(count, *image.shape).to(first.device, first.dtype)
        tunings = [None]
        if self.process == 0:
            for training in (True, False):
                self.hne.tune(x, training=training)
            tunings = [self.hne.tunings]  # type: ignore[list-item]
        broadcast_object_list(tunings)
        self.hne.tunings.update(tunings[0])  # type: ignore[call-overload]

    def _lay_out(self) -> None:
        """Put weights where training is fastest; the same in every process, and after resuming.

        The images follow: convolutions take their weights' layout.
        """
        wanted: bool | None = self.recipe.channels_last
        for situation, tuning in self.hne.tunings.items():
            if situation.training:
                wanted = tuning.plan.channels_last
        layout = torch.channels_last if wanted else torch.contiguous_format
        self.hne.to(memory_format=layout)

    def fit(self) -> Result:
        """Train what is left of the epochs, or until Ctrl-C."""
        _open_trackers(self.accelerator, self.recipe)
        last = _read_epoch(self.directory.metrics()[-1]) if self.epochs else None
        self.reporter.started(self._plan)
        with Interrupt() as interrupt:
            while self.epochs < self.recipe.schedule.epochs:
                epoch = self._epoch(interrupt)
                if epoch is None:
                    self._save()
                    self._end()
                    return Result(self._plan, last, interrupted=True)
                last = epoch
                self._record(epoch)
                self.reporter.finished_epoch(epoch)
        self._end()
        return Result(self._plan, last, interrupted=False)

    def _end(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()  # `end_training` would also end the processes' connection
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _epoch(self, interrupt: Interrupt) -> Epoch | None:
        """Train what is left of an epoch and measure it; None if interrupted before its end."""
        begin, waited = time.perf_counter(), 0.0
        self.order.epoch, self.order.start = self.epochs, self.step - self.epochs * self.steps
        self.hne.train()
        batches = iter(self.train_batches) if self.order.start < self.steps else iter(())
        for index in range(self.order.start, self.steps):
            lr = float(self.optimizer.param_groups[0]["lr"])
            value, idle, (stop, due) = self._step(batches, index, interrupt)
            waited += idle
            accuracy = self.scores.result()[-1].accuracy if self.scores.images else math.nan
            self.reporter.stepped(Step(self.epochs + 1, index + 1, value, accuracy, lr))
            if stop or (self.processes == 1 and interrupt.requested):
                return None
            if due:
                self._save()
        training = time.perf_counter() - begin
        self._share_buffers()
        held_out = measure(
            self.hne if self.ema is None else self.ema.module,
            self._held_out(),
            stop=lambda: interrupt.requested,  # processes may have different numbers of batches
        )
        if self._agreed(interrupt.requested):
            return None
        self._gather_skipped()
        return Epoch(
            self.epochs + 1,
            self.step,
            time.perf_counter() - begin,
            waited / training if training else 0.0,
            self.total / self.order.images,
            self._together(self.scores).result(),
            self._together(held_out).result(),
            len(self.skipped),
        )

    def _share_buffers(self) -> None:
        """Give all processes the running statistics of the first, whose ensemble is saved."""
        if self.processes == 1:
            return
        for model in (self.hne, self.ema):
            for buffer in () if model is None else model.buffers():
                dist.broadcast(buffer, 0)

    def _held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.held_out_batches:
            self.skipped.update(batch.skipped)
            yield batch.images, batch.target

    def _step(
        self, batches: Iterator[Batch], index: int, interrupt: Interrupt
    ) -> tuple[float, float, tuple[bool, bool]]:
        """One step: its loss, seconds spent waiting for images, and whether to stop or save."""
        loss, waited, fresh = torch.zeros((), device=self.device), 0.0, False
        for part in range(self.order.parts):
            begin = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begin
            fresh = fresh or not self.skipped.issuperset(batch.skipped)
            self.skipped.update(batch.skipped)
            loss += self._part(batch, index, part)
        due = time.monotonic() - self.saved > 60 * self.recipe.checkpoints.minutes
        value, (stop, due, fresh) = self._share(loss, interrupt.requested, due, fresh)
        if fresh:
            self._gather_skipped()
        if not math.isfinite(value):
            self._diverged(value)
        clip = self.recipe.optimizer
        if clip.clip_grad is not None:
            self.accelerator.unscale_gradients()
            dispatch_clip_grad(self.hne.parameters(), clip.clip_grad, clip.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.hne, self.step)
        self.total += value * self.order.size(index)
        # The last step's state is saved with the epoch's scores.
        return value, waited, (stop, due and index < self.steps - 1)

    def _part(self, batch: Batch, index: int, part: int) -> Tensor:
        """Forward and backward of a part of this process's share; its part of the loss."""
        seed_everything(seed_of("step", self.recipe.seed, self.step, part, self.process))
        dtype = next(self.hne.parameters()).dtype
        images = batch.images.to(self.device, dtype, non_blocking=True)
        target = batch.target.to(self.device, non_blocking=True)
        labels = target
        if self.mix is not None:
            images, labels = _mixed(self.mix, images, target)
        weight = self.order.weight(index, part)
        if not weight and self.processes == 1:
            return torch.zeros((), device=self.device)
        is_last = part == self.order.parts - 1
        with nullcontext() if is_last else self.accelerator.no_sync(self.model):
            with self._norms(weight):
                logits = self.model(images)
            loss = self.objective(logits, labels, images, self.step / self.steps)
            # Gradients are averaged over processes, the shares of a step are summed.
            self.accelerator.backward(loss * (weight * self.processes))
        if weight:
            self.scores.add(logits, target)
        return loss.detach() * weight

    @contextmanager
    def _norms(self, weight: float) -> Iterator[None]:
        """Batch norms as the recipe wants them; an image that weighs nothing leaves no trace."""
        if self.is_synced:
            with SyncedBatchNorms(counts=weight > 0):
                yield
            return
        if not weight:
            self.hne.eval()
        yield
        if not weight:
            self.hne.train()

    def _share(self, loss: Tensor, *flags: bool) -> tuple[float, tuple[bool, ...]]:
        """The loss of all processes' shares, and each flag that any of them raises."""
        if self.processes == 1:
            return loss.item(), flags
        shared = torch.stack([loss, *(torch.full_like(loss, float(flag)) for flag in flags)])
        dist.all_reduce(shared)
        value, *raised = shared.tolist()
        return value, tuple(map(bool, raised))

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        if self.processes == 1:
            return wish
        flag = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    def _together(self, scores: Scores) -> Scores:
        """The totals of all processes."""
        if self.processes == 1:
            return scores
        found = Scores(scores.tree)
        for name, total in scores.totals.items():
            shared = total.to(self.device, copy=True)
            dist.all_reduce(shared)
            found.totals[name].copy_(shared)
        return found

    def _gather_skipped(self) -> None:
        """Tell all processes of all images that could not be read.

        Raises:
            DataError: they are more than the recipe allows.
        """
        self.skipped = set(gather_object(sorted(self.skipped)))
        if len(self.skipped) > self.recipe.skip_corrupt:
            some = sorted(self.skipped)[:5]
            raise DataError(
                f"{len(self.skipped)} image{'s'[: len(self.skipped) > 1]} cannot be read.",
                expected=f"at most {self.recipe.skip_corrupt} (skip_corrupt)",
                found=", ".join(some) + (", ..." if len(self.skipped) > len(some) else ""),
                next_step="Replace or remove them, or allow more: skip_corrupt=100.",
            )

    def _diverged(self, loss: float) -> None:
        raise DivergedError(
            f"the loss is {loss} in epoch {self.step // self.steps + 1}, "
            f"step {self.step % self.steps + 1}.",
            expected="a finite number",
            found=f"a learning rate of {self.optimizer.param_groups[0]['lr']:.3g} in this step",
            next_step="Try a smaller optimizer.lr, a longer schedule.warmup_epochs or"
            f" optimizer.clip_grad=1. {self.directory.describe_last()}",
        )

    def _record(self, epoch: Epoch) -> None:
        """Write the epoch's metrics and checkpoint."""
        self.epochs, self.total, self.scores = epoch.epoch, 0.0, Scores(self.hne.tree)
        accuracy = epoch.held_out[-1].accuracy
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best = accuracy, state_name(self.step, self.epochs)
        if self.accelerator.is_main_process:
            self.directory.append_metrics(epoch)
        self.accelerator.log(_flat(epoch), step=self.step)
        self._save()

    def _save(self) -> None:
        together = self._together(self.scores)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "epochs": self.epochs,
                "images": self.order.images,
                "best": self.best,
                "best_accuracy": self.best_accuracy,
                "loss": self.total,
                "scores": together.totals,
                "skipped": sorted(self.skipped),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            ema = None if self.ema is None else self.ema.module
            self.directory.save(self.hne, ema, state, keep=self.recipe.checkpoints.keep)
        self.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    def take(self, state: dict[str, Any], ema: HierarchicalEnsemble | None) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: it was saved on other data.
        """
        if state["images"] != self.order.images:
            raise CheckpointError(
                f"{self.directory.path} was trained on other data.",
                expected=f"{state['images']:,} training images",
                found=f"{self.order.images:,}",
            )
        self.step, self.epochs = state["step"], state["epochs"]
        self.best, self.best_accuracy = state["best"], state["best_accuracy"]
        self.total = state["loss"]
        if self.process == 0:  # the totals of all processes
            self.scores.take(state["scores"])
        self.skipped = set(state["skipped"])
        self.optimizer.load_state_dict(_laid_out(state["optimizer"], self.optimizer))
        self.scheduler.step_update(self.step)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and ema is not None:
            self.ema.module.load_state_dict(ema.state_dict())


class _Objective:
    """The recipe's loss, and its teacher's, at any time of the run."""

    def __init__(self, recipe: Recipe, hne: HierarchicalEnsemble, device: torch.device) -> None:
        self.tree, self.recipe = hne.tree, recipe.loss
        self.loss = _loss(recipe.loss)
        self.teacher: Callable[[Tensor], Tensor] | None = None
        self.weight = self.temperature = 0.0
        if recipe.teacher is not None:
            self.teacher = load_teacher(recipe.teacher, next(hne.parameters()), device)
            self.weight, self.temperature = recipe.teacher.weight, recipe.teacher.temperature

    def __call__(self, logits: Tensor, target: Tensor, images: Tensor, epoch: float) -> Tensor:
        ramps = {key: ramp.at(epoch) for key, ramp in self.recipe.ramps.items()}
        loss = self.loss(logits, target, self.tree, **ramps)
        if self.teacher is not None:
            answers = self.teacher(images)
            distilled = losses.from_teacher(
                logits, answers, self.tree, temperature=self.temperature
            )
            loss = loss + self.weight * distilled
        return loss


def _loss(recipe: LossRecipe) -> Callable[..., Tensor]:
    function = losses.get(recipe.name)
    if not isinstance(function, type):
        return partial(function, **recipe.options)
    if not recipe.ramps:
        once: Callable[..., Tensor] = function(**recipe.options)
        return once

    def call(*args: Any, **ramps: Any) -> Tensor:
        found: Tensor = function(**{**recipe.options, **ramps})(*args)
        return found

    return call


def load_teacher(
    recipe: TeacherRecipe, like: Tensor, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A classifier's answers, `[N, C, H, W] -> [N, K]`.

    Args:
        recipe: which one.
        like: gives its dtype.
        device: where it runs.

    Raises:
        ModelError: there is no such model, or its weights cannot be had.
        CheckpointError: the directory holds no ensemble.
    """
    path = Path(recipe.name)
    if path.is_dir():
        teacher: nn.Module = checkpoint.load(measured(path))
    else:
        teacher = Architecture(recipe.name, recipe.kwargs).build(pretrained=True)
    teacher.to(device, like.dtype).eval().requires_grad_(False)

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = teacher(images)
        return logits.mean(1) if isinstance(teacher, HierarchicalEnsemble) else logits

    return answer


def _optimizer(recipe: Recipe, hne: HierarchicalEnsemble) -> torch.optim.Optimizer:
    rule, create = (
        recipe.optimizer,
        cast("Callable[..., torch.optim.Optimizer]", create_optimizer_v2),
    )
    try:
        return create(
            hne,
            rule.name,
            lr=rule.lr,
            weight_decay=rule.weight_decay,
            momentum=rule.momentum,
            filter_bias_and_bn=rule.filter_bias_and_bn,
            layer_decay=rule.layer_decay,
            **rule.options,
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise RecipeError(
            f"optimizer {rule.name!r} cannot be made: {error}",
            expected="options that timm.optim.create_optimizer_v2 takes for it",
        ) from error


def _scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    schedule, create = recipe.schedule, cast("Callable[..., Any]", create_scheduler_v2)
    try:
        scheduler, _ = create(
            optimizer,
            schedule.name,
            num_epochs=schedule.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
            **schedule.options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(
            f"schedule {schedule.name!r} cannot be made: {error}",
            expected="options that timm.scheduler.create_scheduler_v2 takes",
        ) from error
    return scheduler


def _accelerator(recipe: Recipe, device: torch.device, directory: RunDirectory) -> Accelerator:
    # One process may train several recipes; Accelerate keeps the first one's settings otherwise.
    AcceleratorState._reset_state()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=_PRECISIONS[recipe.precision],
            log_with=list(recipe.trackers) or None,
            project_dir=directory.path,
            dynamo_backend="inductor" if recipe.compile else None,
        )
    except ValueError as error:
        raise RecipeError(
            f"this run cannot be set up: {error}",
            next_step="Set precision=fp32, or other trackers.",
        ) from error
    there = {str(getattr(own, "value", getattr(own, "name", own))) for own in accelerator.log_with}
    if missing := sorted(set(recipe.trackers) - there):
        raise RecipeError(
            f"trackers {', '.join(missing)} are not there.",
            next_step="Install them, e.g. pip install 'treeify[tensorboard]'.",
        )
    return accelerator


def _open_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    if not recipe.trackers:
        return
    accelerator.init_trackers(recipe.name)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # it would take the configuration for another run
            tracker.store_init_configuration({"recipe": json.dumps(recipe.model_dump())})


def _laid_out(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's state in the parameters' memory formats, in which it was computed."""
    parameters = [own for group in optimizer.param_groups for own in group["params"]]
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = like(value, parameters[int(index)])
    return state


def _mixing(recipe: MixRecipe, classes: int) -> Mixup:
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.prob if recipe.mixup or recipe.cutmix else 0.0,
        switch_prob=recipe.switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )


def _mixed(mix: Mixup, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images and the shares of their classes; the last of an odd number stays as it is."""
    even = len(images) // 2 * 2
    smooth: Tensor = mixup_target(target, mix.num_classes, 1.0, mix.label_smoothing)  # type: ignore[no-untyped-call]
    smooth = smooth.to(images.dtype)
    if even:
        images, labels = images.clone(), smooth.clone()
        images[:even], labels[:even] = mix(images[:even].clone(), target[:even])
        return images, labels
    return images, smooth


def _chosen_directory(
    recipe: Recipe, wanted: Path | str | None, overwrite: bool, state: PartialState
) -> RunDirectory:
    """Where a new run goes; chosen by the main process, and made once the run can begin."""
    path = [""]
    if state.is_main_process:
        if wanted is not None:
            check_free(Path(wanted), overwrite=overwrite)
        path = [str(new_path(recipe.name) if wanted is None else wanted)]
    broadcast_object_list(path)
    return RunDirectory(Path(path[0]))


def _newest(directory: RunDirectory, state: PartialState, reporter: Reporter) -> Saved | None:
    """The state to go on from; the main process tidies up and chooses."""
    path: list[Path | None] = [None]
    if state.is_main_process:
        path = [directory.newest(reporter.warned)]
    broadcast_object_list(path)
    return None if path[0] is None else load_state(path[0])


def _flat(epoch: Epoch) -> dict[str, float]:
    """What trackers are told."""
    found = {"loss": epoch.loss, "seconds": epoch.seconds, "waiting": epoch.waiting}
    for part in ("train", "held_out"):
        for score in getattr(epoch, part):
            for name, value in asdict(score).items():
                found[f"{part}/{name}/{score.leaves}"] = value
    return found


def _read_epoch(row: dict[str, Any]) -> Epoch:
    """A line of `metrics.jsonl`."""
    scores = {part: tuple(Score(**own) for own in row[part]) for part in ("train", "held_out")}
    return Epoch(**{**row, **scores})


@contextmanager
def _explained(directory: RunDirectory) -> Iterator[None]:
    """Turn what a dead worker or process leaves behind into one clear message."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        alone = not is_distributed()
        lost = not alone and any(word in text for word in ("Connection", "gloo", "NCCL"))
        if not (lost or "DataLoader worker (pid" in text or isinstance(error, dist.DistError)):
            raise
        raise LostProcessError(
            "a process of this run died.",
            found=text.splitlines()[0],
            next_step="Often memory ran out: see the system's log, or set fewer workers. "
            + directory.describe_last(),
        ) from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
