"""Training runs: from a recipe to a trained ensemble, measured after every epoch.

One process or several: `torchrun --nproc-per-node 4 -m treeify train RECIPE`, or `accelerate launch
-m treeify train RECIPE`. Every process computes its part of each step's images; the batch size
stays what the recipe says.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.engine import timing
from treeify.engine.preserve import preserve_modes
from treeify.errors import CheckpointError, RecipeError, TreeifyError
from treeify.evaluation.metrics import Scores, measure, placed, require_labels
from treeify.seeds import seed_of
from treeify.training import claim, distributed, fine_tuning, loaders, optimizers, run_directory
from treeify.training.distributed import Team, resolve_device
from treeify.training.events import Epoch, Reporter, Result, RunSize, Step, flat
from treeify.training.interrupt import Interrupt
from treeify.training.model import (
    as_saved,
    build,
    check_classes,
    choose_execution,
    keep_together,
    load_data,
    other_classes,
    remember_preparation,
)
from treeify.training.objective import Objective, mixed, mixing
from treeify.training.recipe import Recipe, longer
from treeify.training.run_directory import RunDirectory, SavedState
from treeify.training.run_state import RunState
from treeify.training.sync_batch_norm import SyncedBatchNorms, is_distributed


class DivergedError(TreeifyError):
    """The training loss is no longer a number."""


def train(
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    resume: Path | str | None = None,
    more_epochs: int = 0,
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
        more_epochs: make the resumed run, which may be finished, so much longer. Its recipe file
            records it under `schedule.extended`, which also says what rates it has then.
        reporter: hears about every step and epoch.

    Returns:
        The trained ensemble, its last scores and where the run is.

    Raises:
        RecipeError: the data and the model have different numbers of classes, the device is not
            there, what is frozen is not either, or there is no run to make longer.
        CheckpointError: the run directory is not empty or another process trains in it, the run to
            resume has another recipe, or a state cannot be written.
        DataError: the data set cannot be read, too many images cannot, there is one class only, or
            a label is of none.
        DivergedError: the loss became infinite or not a number.
        LostProcessError: a loader's worker or another process died.
    """
    if more_epochs and resume is None:
        raise RecipeError("there is no run to make longer.", next_step="Name it: --resume RUN.")
    device = resolve_device(recipe.device)
    processes = distributed.join(device)
    is_main = processes.is_main_process
    reporter = reporter if reporter is not None and is_main else Reporter()
    with timing.threads(recipe.threads), ExitStack() as stack:
        # Locked before `newest` tidies up, which would remove drafts that another process writes.
        opened = (
            claim.claimed(recipe, out, overwrite=overwrite, warn=reporter.warned)
            if resume is None
            else claim.resumed(resume, recipe, reporter.warned)
        )
        directory = distributed.from_first(lambda: stack.enter_context(opened))
        recipe = longer(recipe, more_epochs)
        with processes.local_main_process_first():
            data = load_data(recipe)
        saved = None
        if resume is not None:
            newest = distributed.from_first(lambda: directory.newest(reporter.warned))
            saved = None if newest is None else run_directory.load_state(newest, recipe)
        if saved is not None:
            data = as_saved(saved.hne, recipe.data, data)
        hne = build(recipe, data) if saved is None else saved.hne
        fine_tuning.freeze(hne, recipe.model)  # earlier versions did not save the norms' modes
        check_classes(hne, data)
        if text := other_classes(hne, data, recipe.model):
            reporter.warned(text)
        remember_preparation(hne, data)
        trainer = Trainer(recipe, data, hne, device, directory, reporter)
        if saved is not None:
            trainer.load(saved)
        # Only now, when nothing of the recipe can be wrong any more, is an earlier run replaced.
        if is_main and resume is None:
            directory.describe(recipe, device)
        elif is_main and more_epochs:
            directory.write_recipe(recipe)
            reporter.warned(optimizers.extension(recipe.schedule, trainer.state.optimizer))
        with distributed.explained(directory.describe_last):
            return trainer.fit()


class Trainer:
    """The loop of a training run, in one of its processes."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        hne: HierarchicalEnsemble,
        device: torch.device,
        directory: RunDirectory,
        reporter: Reporter,
    ) -> None:
        """Connect everything that the recipe names; nothing is trained or written yet."""
        self.recipe, self.data, self.hne = recipe, data, hne
        self.directory, self.reporter = directory, reporter
        self.accelerator = distributed.accelerator(recipe, device, directory.path)
        self.team = team = Team(self.accelerator)
        hne.to(team.device, torch.float64 if recipe.precision == "fp64" else None)
        divided = {"process": team.index, "processes": team.size}
        self.order = loaders.Order(
            len(data.train),  # type: ignore[arg-type]
            recipe.batch_size,
            recipe.seed,
            parts=recipe.gradient_accumulation,
            **divided,
        )
        if self.order.smallest == 1:
            keep_together(self.order, hne, data, reporter.warned)
        self.train_batches = loaders.training_loader(data, self.order, recipe.workers)
        self.held_out_batches = loaders.held_out_loader(
            data.held_out,
            recipe.batch_size,
            workers=recipe.workers,
            skip=recipe.skip_corrupt > 0,
            **divided,
        )
        self.objective = Objective(recipe, hne, team.device)
        self.mix = None if recipe.mix is None else mixing(recipe.mix, len(data.classes))
        # Before the average copies the weights: it is to have their memory format.
        images = max(self.order.fewest, recipe.batch_size // (team.size * self.order.parts))
        choose_execution(hne, recipe, data, images, team)
        self.ema = None
        if recipe.ema is not None:
            self.ema = ModelEmaV3(hne, recipe.ema.decay, use_warmup=recipe.ema.warmup)
        optimizer = optimizers.optimizer(recipe.optimizer, hne)
        self.scheduler = optimizers.scheduler(recipe.schedule, optimizer, self.order.steps)
        self.model = self.accelerator.prepare_model(hne)
        scaler = self.accelerator.scaler
        # Only a gradient scaler needs the wrapper, which searches for packages in every step.
        wrapped = optimizer if scaler is None else self.accelerator.prepare_optimizer(optimizer)
        self.state = RunState(
            images=self.order.images, scores=Scores(hne.tree), optimizer=wrapped, scaler=scaler
        )
        self.is_synced = recipe.sync_batch_norm and is_distributed()
        self.saved_at = time.monotonic()

    def load(self, saved: SavedState) -> None:
        """Go on from a saved state, whose ensemble this one is; it has to be of the same data."""
        if (expected := saved.state["images"]) != self.order.images:
            raise CheckpointError(
                f"{self.directory.path} was trained on other data.",
                expected=f"{expected:,} training images",
                found=f"{self.order.images:,}",
            )
        self.state.load_state_dict(saved.state)
        # The saved scores are those of all processes, and must be counted once.
        if self.team.index:
            self.state.scores = Scores(self.hne.tree)
        self.scheduler.step_update(self.state.step)
        if self.ema is not None and saved.ema is not None:
            self.ema.module.load_state_dict(saved.ema.state_dict())

    def fit(self) -> Result:
        """Train what is left of the epochs, or until Ctrl-C."""
        distributed.open_trackers(self.accelerator, self.recipe)
        epoch = self.directory.epoch(self.state.epochs, self.hne.tree.levels)
        self.reporter.started(self._size())
        if not self.state.step:
            for doubt in optimizers.doubts(self.recipe, self.order.steps):
                self.reporter.warned(doubt)
        interrupted = False
        with Interrupt() as interrupt:
            while self.state.epochs < self.recipe.schedule.epochs and not interrupted:
                finished = self._train_epoch(interrupt)
                if finished is None:
                    interrupted = True
                    self._save()
                else:
                    epoch = finished
                    self._finish_epoch(epoch)
                    self.reporter.finished_epoch(epoch)
        for tracker in self.accelerator.trackers:
            tracker.finish()  # `end_training` would also end the processes' connection
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return Result(self._size(), epoch, interrupted)

    def _size(self) -> RunSize:
        return RunSize(
            self.directory.path,
            self.hne,
            self.data,
            self.recipe.schedule.epochs,
            self.order.steps,
            self.team.device,
            self.team.size,
            self.state.step,
        )

    def _train_epoch(self, interrupt: Interrupt) -> Epoch | None:
        """Train what is left of an epoch and measure it; None if interrupted before its end."""
        state, order = self.state, self.order
        begin = time.perf_counter()
        order.epoch, order.start = state.epochs, state.step - state.epochs * order.steps
        self.hne.train()
        # After the last step of an epoch, a loader would start its workers for nothing.
        batches = loaders.TimedBatches(self.train_batches if order.start < order.steps else ())
        for index in range(order.start, order.steps):
            lr = optimizers.learning_rate(state.optimizer)
            loss, is_interrupted, is_save_due = self._step(batches, index, interrupt)
            self.reporter.stepped(
                Step(state.epochs + 1, index + 1, loss, state.scores.accuracy, lr)
            )
            # Alone, this process need not wait for the others to learn of it in the next step.
            if is_interrupted or (self.team.size == 1 and interrupt.requested):
                return None
            if is_save_due:
                self._save()
        training_time = time.perf_counter() - begin
        self.team.broadcast_buffers(self.hne, *([] if self.ema is None else [self.ema]))
        held_out = measure(
            self.hne if self.ema is None else self.ema.module,
            loaders.noting(self.held_out_batches, state.skipped),
            stop=lambda: interrupt.requested,  # processes may have different numbers of batches
        )
        if self.team.any(interrupt.requested):
            return None
        self._gather_skipped()
        return Epoch(
            state.epochs + 1,
            state.step,
            time.perf_counter() - begin,
            batches.seconds / training_time if training_time else 0.0,
            state.loss / order.images,
            self.team.combine(state.scores).result(),
            self.team.combine(held_out).result(),
            len(state.skipped),
        )

    def _step(
        self, batches: loaders.TimedBatches, index: int, interrupt: Interrupt
    ) -> tuple[float, bool, bool]:
        """The next step of an epoch: its loss, whether it was interrupted, whether to save.

        The interrupt is asked once, so that all processes stop after the same step.
        """
        state = self.state
        loss, has_skipped = torch.zeros((), device=self.team.device), False
        for part in range(self.order.parts_of(index)):
            batch = next(batches)
            has_skipped = has_skipped or not state.skipped.issuperset(batch.skipped)
            state.skipped.update(batch.skipped)
            loss += self._accumulate(batch, index, part)
        minutes = (time.monotonic() - self.saved_at) / 60
        is_save_due = minutes > self.recipe.checkpoints.minutes
        value, (is_interrupted, is_save_due, has_skipped) = self.team.sum(
            loss, interrupt.requested, is_save_due, has_skipped
        )
        if has_skipped:
            self._gather_skipped()
        if not math.isfinite(value):
            raise self._diverged(value)
        options = self.recipe.optimizer
        if options.clip_grad is not None:
            self.accelerator.unscale_gradients()
            dispatch_clip_grad(self.hne.parameters(), options.clip_grad, options.clip_mode)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        self.scheduler.step_update(state.step)
        if self.ema is not None:
            self.ema.update(self.hne, state.step)
        state.loss += value * self.order.size(index)
        # The last step's state is saved with the epoch's scores.
        return value, is_interrupted, is_save_due and index < self.order.steps - 1

    def _accumulate(self, batch: loaders.Batch, index: int, part: int) -> Tensor:
        """Add a part's gradients to those of its step; return its part of the step's loss."""
        # Dropout and mixing depend on nothing but this, so a resumed step draws the same numbers.
        seed = seed_of("step", self.recipe.seed, self.state.step, part, self.team.index)
        loaders.seed_everything(seed)
        require_labels(batch.target, len(self.data.classes))
        images = placed(batch.images, self.hne, non_blocking=True)
        target = batch.target.to(self.team.device, non_blocking=True)
        labels = target
        if self.mix is not None:
            images, labels = mixed(self.mix, images, target)
        weight = self.order.weight(index, part)
        is_last = part == self.order.parts_of(index) - 1
        with nullcontext() if is_last else self.accelerator.no_sync(self.model):
            with self._batch_norms(weight):
                logits = self.model(images)
            loss = self.objective(logits, labels, images, self.state.step / self.order.steps)
            # The step's loss is the mean over its images, and a part's weight the fraction of them
            # that it has. Processes' gradients are averaged, though, not summed.
            self.accelerator.backward(loss * (weight * self.team.size))
        if weight:
            self.state.scores.add(logits, target)
        return loss.detach() * weight

    @contextmanager
    def _batch_norms(self, weight: float) -> Iterator[None]:
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
        """Tell all processes of all images that could not be read; too many are a DataError."""
        self.state.skipped = self.team.union(self.state.skipped)
        loaders.check_skipped(self.state.skipped, self.recipe.skip_corrupt)

    def _diverged(self, loss: float) -> DivergedError:
        epoch, index = divmod(self.state.step, self.order.steps)
        lr = optimizers.learning_rate(self.state.optimizer)
        return DivergedError(
            f"the loss is {loss} in epoch {epoch + 1}, step {index + 1}.",
            expected="a finite number",
            found=f"a learning rate of {lr:.3g} in this step",
            next_step="Try a smaller optimizer.lr, a longer schedule.warmup_epochs or"
            f" optimizer.clip_grad=1. {self.directory.describe_last()}",
        )

    def _finish_epoch(self, epoch: Epoch) -> None:
        """Write the epoch's metrics and checkpoint.

        In this order: a line without its checkpoint is removed when the run goes on, but the
        epoch of a checkpoint without its line would be missing for ever.
        """
        state = self.state
        state.epochs, state.loss, state.scores = epoch.epoch, 0.0, Scores(self.hne.tree)
        accuracy = epoch.held_out[-1].accuracy
        if accuracy > state.best_accuracy:
            state.best_accuracy = accuracy
            state.best = run_directory.state_name(state.step, state.epochs)
        if self.accelerator.is_main_process:
            self.directory.append_metrics(epoch)
        self.accelerator.log(flat(epoch), step=state.step)
        self._save()

    def _save(self) -> None:
        """Write the state of the run; the first process does, with the scores of all of them."""
        scores = self.team.combine(self.state.scores)
        if self.accelerator.is_main_process:
            state = replace(self.state, scores=scores).state_dict()
            ema = None if self.ema is None else self.ema.module
            self.directory.save(self.hne, ema, state, keep=self.recipe.checkpoints.keep)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()
