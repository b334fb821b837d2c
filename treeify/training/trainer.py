"""Training runs: from a recipe to a trained ensemble, measured after every epoch.

One process or several: `torchrun --nproc-per-node 4 -m treeify train RECIPE`, or `accelerate launch
-m treeify train RECIPE`. Every process computes its share of each step's images; the batch size
stays what the recipe says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from treeify.conversion.api import hierarchicalize
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.engine import timing
from treeify.engine.preserve import preserve_modes
from treeify.errors import CheckpointError, DataError, RecipeError, TreeifyError
from treeify.evaluation.metrics import Scores, measure
from treeify.models.architecture import Architecture
from treeify.seeds import seed_of
from treeify.training import distributed, optimizers
from treeify.training.distributed import Team, resolve_device
from treeify.training.events import Epoch, Reporter, Result, RunSize, Step, flat, read_epoch
from treeify.training.interrupt import Interrupt
from treeify.training.loaders import (
    Batch,
    Order,
    held_out_loader,
    noting,
    seed_everything,
    training_loader,
)
from treeify.training.objective import Objective, mixed, mixing
from treeify.training.recipe import Recipe
from treeify.training.run_directory import (
    RunDirectory,
    Saved,
    check_free,
    check_same,
    load_state,
    locked,
    make,
    new_path,
    state_name,
)
from treeify.training.sync_batch_norm import SyncedBatchNorms, is_distributed


class DivergedError(TreeifyError):
    """The training loss is no longer a number."""


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
    state = distributed.join(device)
    reporter = reporter if reporter is not None and state.is_main_process else Reporter()
    if resume is not None:
        directory = RunDirectory(Path(resume))
        check_same(directory, recipe)
    else:
        directory = _chosen_directory(recipe, out or recipe.out, overwrite, state)
    with timing.threads(recipe.threads), ExitStack() as held:
        if resume is not None and state.is_main_process:
            held.enter_context(locked(directory))
        with state.local_main_process_first():
            data = recipe.data.load()
        saved = None if resume is None else _newest(directory, state, reporter)
        hne = build(recipe, data) if saved is None else saved.hne
        if saved is not None:
            check_classes(hne, data)
        run = _Run(recipe, data, hne, device, directory, reporter)
        if saved is not None:
            run.take(saved.state, saved.ema)
        if resume is None and state.is_main_process:
            make(directory.path).describe(recipe, device)
            held.enter_context(locked(directory))
        with distributed.explained(directory.describe_last):
            return run.fit()


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
    """Raise RecipeError unless the ensemble has one logit, and no more, for each class."""
    image = data.example()
    first = next(hne.parameters())
    with preserve_modes(hne):
        output = hne.eval()(image[None].to(first.device, first.dtype), leaves=1)
    if not isinstance(output, Tensor):
        raise RecipeError(
            "the model does not return logits.",
            expected="one tensor, [N, K]",
            found=type(output).__name__,
            next_step="Train a module whose forward returns the logits alone.",
        )
    outputs = output.shape[-1]
    if outputs != len(data.classes):
        raise RecipeError(
            "the model does not fit the data.",
            expected=f"a model with the data's {len(data.classes)} classes",
            found=f"one with {outputs}",
            next_step=f"Set model.kwargs.num_classes={len(data.classes)}, or its name for it.",
        )


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
        self.accelerator = distributed.accelerator(recipe, device, directory.path)
        self.team = team = Team(self.accelerator)
        hne.to(team.device, torch.float64 if recipe.precision == "fp64" else None)
        images = len(data.train)  # type: ignore[arg-type]
        self.order = Order(
            images,
            recipe.batch_size,
            recipe.seed,
            process=self.team.index,
            processes=self.team.size,
            parts=recipe.gradient_accumulation,
        )
        self.train_batches = training_loader(data, self.order, recipe.workers)
        self.held_out_batches = held_out_loader(
            data.held_out,
            recipe.batch_size,
            workers=recipe.workers,
            process=self.team.index,
            processes=self.team.size,
            skip=recipe.skip_corrupt > 0,
        )
        self.steps = self.order.steps
        self.objective = Objective(recipe, hne, team.device)
        self.mix = None if recipe.mix is None else mixing(recipe.mix, len(data.classes))
        self._tune(data)
        self._lay_out()
        self.ema = None
        if recipe.ema is not None:
            self.ema = ModelEmaV3(hne, recipe.ema.decay, use_warmup=recipe.ema.warmup)
        optimizer = optimizers.optimizer(recipe.optimizer, hne)
        self.scheduler = optimizers.scheduler(recipe.schedule, optimizer, self.steps)
        self.model = self.accelerator.prepare_model(hne)
        # Only a gradient scaler needs the wrapper, which searches for packages in every step.
        scaled = self.accelerator.scaler is not None
        self.optimizer = self.accelerator.prepare_optimizer(optimizer) if scaled else optimizer
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
    def _size(self) -> RunSize:
        return RunSize(
            self.directory.path,
            self.hne,
            self.data,
            self.recipe.schedule.epochs,
            self.steps,
            self.team.device,
            self.team.size,
            self.step,
        )

    def _tune(self, data: Data) -> None:
        """Measure which way of running is fastest, once for all processes."""
        self.hne.execution = self.recipe.execution
        if not self.recipe.tune or self.hne.tunings:
            return
        image = data.example()
        self._lay_out()  # what it is compared with
        count = max(1, self.recipe.batch_size // (self.team.size * self.order.parts))
        first = next(self.hne.parameters())
        x = image[None].expand(count, *image.shape).to(first.device, first.dtype)
        tunings = [None]
        if self.team.index == 0:
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
        distributed.open_trackers(self.accelerator, self.recipe)
        last = read_epoch(self.directory.metrics()[-1]) if self.epochs else None
        self.reporter.started(self._size)
        with Interrupt() as interrupt:
            while self.epochs < self.recipe.schedule.epochs:
                epoch = self._epoch(interrupt)
                if epoch is None:
                    self._save()
                    self._end()
                    return Result(self._size, last, interrupted=True)
                last = epoch
                self._record(epoch)
                self.reporter.finished_epoch(epoch)
        self._end()
        return Result(self._size, last, interrupted=False)

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
            self.reporter.stepped(Step(self.epochs + 1, index + 1, value, self.scores.accuracy, lr))
            if stop or (self.team.size == 1 and interrupt.requested):
                return None
            if due:
                self._save()
        training = time.perf_counter() - begin
        self.team.take_buffers(self.hne, *([] if self.ema is None else [self.ema]))
        held_out = measure(
            self.hne if self.ema is None else self.ema.module,
            noting(self.held_out_batches, self.skipped),
            stop=lambda: interrupt.requested,  # processes may have different numbers of batches
        )
        if self.team.any(interrupt.requested):
            return None
        self._gather_skipped()
        return Epoch(
            self.epochs + 1,
            self.step,
            time.perf_counter() - begin,
            waited / training if training else 0.0,
            self.total / self.order.images,
            self.team.together(self.scores).result(),
            self.team.together(held_out).result(),
            len(self.skipped),
        )

    def _step(
        self, batches: Iterator[Batch], index: int, interrupt: Interrupt
    ) -> tuple[float, float, tuple[bool, bool]]:
        """One step: its loss, seconds spent waiting for images, and whether to stop or save."""
        loss, waited, fresh = torch.zeros((), device=self.team.device), 0.0, False
        for part in range(self.order.parts):
            begin = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begin
            fresh = fresh or not self.skipped.issuperset(batch.skipped)
            self.skipped.update(batch.skipped)
            loss += self._part(batch, index, part)
        due = time.monotonic() - self.saved > 60 * self.recipe.checkpoints.minutes
        value, (stop, due, fresh) = self.team.sum(loss, interrupt.requested, due, fresh)
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
        seed_everything(seed_of("step", self.recipe.seed, self.step, part, self.team.index))
        dtype = next(self.hne.parameters()).dtype
        images = batch.images.to(self.team.device, dtype, non_blocking=True)
        target = batch.target.to(self.team.device, non_blocking=True)
        labels = target
        if self.mix is not None:
            images, labels = mixed(self.mix, images, target)
        weight = self.order.weight(index, part)
        if not weight and self.team.size == 1:
            return torch.zeros((), device=self.team.device)
        is_last = part == self.order.parts - 1
        with nullcontext() if is_last else self.accelerator.no_sync(self.model):
            with self._norms(weight):
                logits = self.model(images)
            loss = self.objective(logits, labels, images, self.step / self.steps)
            # Gradients are averaged over processes, the shares of a step are summed.
            self.accelerator.backward(loss * (weight * self.team.size))
        if weight:
            self.scores.add(logits, target)
        return loss.detach() * weight

    @contextmanager
    def _norms(self, weight: float) -> Iterator[None]:
        """Batch norms as the recipe wants them; an image that weighs nothing leaves no trace."""
        if self.is_synced:
            with SyncedBatchNorms(counts=weight > 0):
                yield
        elif weight:
            yield
        else:
            with preserve_modes(self.hne):
                self.hne.eval()
                yield

    def _gather_skipped(self) -> None:
        """Tell all processes of all images that could not be read.

        Raises:
            DataError: they are more than the recipe allows.
        """
        self.skipped = self.team.union(self.skipped)
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
        self.accelerator.log(flat(epoch), step=self.step)
        self._save()

    def _save(self) -> None:
        together = self.team.together(self.scores)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "epochs": self.epochs,
                "images": self.order.images,
                "best": self.best,
                "best_accuracy": self.best_accuracy,
                "loss": self.total,
                "scores": together.state_dict(),
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
        if self.team.index == 0:  # the totals of all processes
            self.scores.load_state_dict(state["scores"])
        self.skipped = set(state["skipped"])
        self.optimizer.load_state_dict(optimizers.laid_out(state["optimizer"], self.optimizer))
        self.scheduler.step_update(self.step)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and ema is not None:
            self.ema.module.load_state_dict(ema.state_dict())


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
