"""Which images a training step sees, and with what randomness: functions of seed, epoch and step.

Nothing here has a state that could be lost. The order of an epoch depends on `(seed, epoch)`, the
augmentation of an image on `(seed, epoch, image)`, dropout on `(seed, step, share)`. So a run that
was stopped goes on as if it had not been, and several processes see what one would see.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from treeify.data import Data, Examples, UnreadableImageError
from treeify.errors import DataError
from treeify.seeds import seed_of


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, which augmentations draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not `torch.manual_seed`, which takes a millisecond to note a stack for each device not in use.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Draw(NamedTuple):
    """An image to load, and the epoch whose augmentation it gets."""

    image: int
    epoch: int


class Batch(NamedTuple):
    """A process's share of a training step, or a part of it.

    Args:
        images: [N, 3, H, W].
        target: classes, [N].
        skipped: images that could not be read; others are in their places.
    """

    images: Tensor
    target: Tensor
    skipped: tuple[str, ...]


class Order(Sampler[list[Draw]]):
    """The shares of one process, step by step: random, each image once an epoch.

    A step's images are the same on any number of processes: they are dealt out, in parts if
    gradients are accumulated. Set `epoch` and `start` before iterating.

    Args:
        images: how many there are.
        batch_size: images of all processes per step; the last step of an epoch may have fewer.
        seed: of the order.
        process: whose shares.
        processes: among how many each step is dealt out.
        parts: batches that make up a process's share of one step.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        process: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.process, self.processes, self.parts = process, processes, parts
        self.epoch = 0
        self.start = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.images // self.batch_size)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def size(self, step: int) -> int:
        """Images of all processes in a step, counted from 0 within the epoch."""
        return min(self.batch_size, self.images - step * self.batch_size)

    def weight(self, step: int, part: int) -> float:
        """The share of a step's images that is in this process's part of it."""
        shares = self._deal(torch.arange(self.size(step)))
        return len(shares[part * self.processes + self.process]) / self.size(step)

    def _deal(self, batch: Tensor) -> Sequence[Tensor]:
        return batch.tensor_split(self.processes * self.parts)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator)
        for step in range(self.start, self.steps):
            batch = order[step * self.batch_size :][: self.batch_size]
            shares = self._deal(batch)
            for part in range(self.parts):
                own = shares[part * self.processes + self.process]
                # Every process computes something, so that all of them meet; it weighs nothing.
                own = own if len(own) else batch[:1]
                yield [Draw(index, self.epoch) for index in own.tolist()]


class Drawn(Dataset[tuple[Any, Any, tuple[str, ...]]]):
    """Training examples by `Draw`; one that cannot be read is replaced by the next that can.

    Args:
        examples: the images and classes.
        seed: of the augmentation.
    """

    def __init__(self, examples: Any, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __getitem__(self, draw: Draw) -> tuple[Any, Any, tuple[str, ...]]:
        skipped: list[str] = []
        count = len(self.examples)
        for index in ((draw.image + further) % count for further in range(count)):
            seed_everything(seed_of("image", self.seed, draw.epoch, index))
            try:
                image, label = self.examples[index]
            except UnreadableImageError as error:
                skipped.append(error.path)
            else:
                return image, label, tuple(skipped)
        raise DataError("none of the training images can be read.", found=skipped[0])


class HeldOut(Dataset[Any]):
    """A process's held-out examples.

    Args:
        examples: the images and classes.
        process: takes every `processes`-th image, beginning with this one.
        processes: how many share the images.
        skip: give None and the path in the place of an image that cannot be read.
    """

    def __init__(self, examples: Any, process: int, processes: int, *, skip: bool) -> None:
        self.examples, self.process, self.processes = examples, process, processes
        self.skip = skip

    def __len__(self) -> int:
        return len(range(self.process, len(self.examples), self.processes))

    def __getitem__(self, index: int) -> Any:
        try:
            image, label = self.examples[self.process + index * self.processes]
        except UnreadableImageError as error:
            if not self.skip:
                raise
            return None, None, (error.path,)
        return image, label, ()


def collate(items: list[Any]) -> Batch:
    """Stack what was read: of the held-out images of a batch there may be none."""
    skipped = tuple(path for *_, paths in items for path in paths)
    read = [(image, label) for image, label, _ in items if image is not None]
    if not read:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), skipped)
    images, target = default_collate(read)
    return Batch(images, target, skipped)


def training_loader(data: Data, order: Order, workers: int = 0) -> DataLoader[Batch]:
    """Batches in an order of training.

    Args:
        data: the data set.
        order: which images when.
        workers: processes that prepare images; 0 prepares them in this one.
    """
    return _loader(Drawn(data.train, order.seed), workers, batch_sampler=order)


def held_out_loader(
    examples: Examples,
    batch_size: int,
    *,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    skip: bool = False,
) -> DataLoader[Batch]:
    """Batches of held-out images, in order.

    Args:
        examples: the images and classes.
        batch_size: images per batch.
        workers: processes that prepare images; 0 prepares them in this one.
        process: takes every `processes`-th image, beginning with this one.
        processes: how many share the images.
        skip: leave out images that cannot be read, and name them; else they are an error.
    """
    share = HeldOut(examples, process, processes, skip=skip)
    return _loader(share, workers, batch_size=batch_size)


def noting(batches: Iterable[Batch], skipped: set[str]) -> Iterator[Batch]:
    """The batches; images that could not be read are added to the set."""
    for batch in batches:
        skipped.update(batch.skipped)
        yield batch


def check_skipped(skipped: Collection[str], allowed: int) -> None:
    """Compare the images that could not be read with how many a recipe allows.

    Raises:
        DataError: they are more.
    """
    if len(skipped) > allowed:
        paths = sorted(skipped)[:5]
        raise DataError(
            f"{len(skipped)} image{'s'[: len(skipped) > 1]} cannot be read.",
            expected=f"at most {allowed} (skip_corrupt)",
            found=", ".join(paths) + (", ..." if len(skipped) > len(paths) else ""),
            next_step="Replace or remove them, or allow more: skip_corrupt=100.",
        )


class TimedBatches(Iterator[Batch]):
    """Batches, and the seconds that were spent waiting for them.

    Args:
        batches: of a loader.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.seconds = 0.0
        self._batches = iter(batches)

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - begin
        return batch


def _loader(examples: Dataset[Any], workers: int, **options: Any) -> DataLoader[Batch]:
    return DataLoader(
        examples,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=_ignore_interrupts,
        **options,
    )


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C and SIGTERM may reach a whole group of processes; the trainer alone stops the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
