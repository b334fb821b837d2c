"""Which images a training step sees, and with what randomness: functions of seed, epoch and step.

Nothing here has a state that could be lost. The order of an epoch depends on `(seed, epoch)`, the
augmentation of an image on `(seed, epoch, image)`, dropout on `(seed, step, part, process)`. So a
resumed run sees what it would have seen without the stop, whichever worker prepares an image, and
several processes see the images that one would.
"""

import os
import random
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from treeify.data import Data, Examples, UnreadableImageError
from treeify.errors import DataError, joined
from treeify.seeds import seed_of


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, which augmentations draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not `torch.manual_seed`: it takes a millisecond to record a stack for devices not in use.
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
    """Images that are computed together: a training step's, or a part of them.

    Args:
        images: [N, 3, H, W].
        target: classes, [N].
        skipped: paths of images that could not be read; others are in their places.
    """

    images: Tensor
    target: Tensor
    skipped: tuple[str, ...]


class Order(Sampler[list[Draw]]):
    """The batches of one process, step by step: in random order, each image once an epoch.

    A step's images are the same on any number of processes, which divide them: `batch_size` of all
    together, the last step of an epoch may have fewer. Each process has `parts` batches of a step,
    to accumulate gradients, or fewer if the step has not enough images for all. Set `epoch` and
    `start`, the first step, before iterating.

    No batch has less than `fewest` images, but for those that stand in for none. What is left over
    at the end of an epoch joins the step before it if it is less than that.
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
        fewest: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.fewest = fewest
        self.process, self.processes, self.parts = process, processes, parts
        self.epoch = 0
        self.start = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        whole, left_over = divmod(self.images, self.batch_size)
        return max(1, whole + (left_over >= self.fewest))

    def __len__(self) -> int:
        return sum(map(self.parts_of, range(self.start, self.steps)))

    def size(self, step: int) -> int:
        """Images of all processes in a step, counted from 0 within the epoch."""
        left = self.images - step * self.batch_size
        return left if step == self.steps - 1 else self.batch_size

    @property
    def smallest(self) -> int:
        """Images in the smallest batch of an epoch."""
        sizes = (self.size(0), self.size(self.steps - 1))
        return min(size // self._divisions(size) for size in sizes)

    def parts_of(self, step: int) -> int:
        """How many batches of a step each process has."""
        return -(-self._divisions(self.size(step)) // self.processes)

    def weight(self, step: int, part: int) -> float:
        """The fraction of a step's images that is in this process's part of it."""
        return len(self._part(torch.arange(self.size(step)), part)) / self.size(step)

    def _divisions(self, images: int) -> int:
        """Among how many batches, of all processes, a step's images are divided."""
        return min(self.processes * self.parts, max(1, images // self.fewest))

    def _part(self, step_images: Tensor, part: int) -> Tensor:
        batches = step_images.tensor_split(self._divisions(len(step_images)))
        index = part * self.processes + self.process
        return batches[index] if index < len(batches) else step_images[:0]

    def __iter__(self) -> Iterator[list[Draw]]:
        # Drawn in full even from the middle of an epoch, and by every process: all see one order.
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator)
        for step in range(self.start, self.steps):
            step_images = order[step * self.batch_size :][: self.size(step)]
            for part in range(self.parts_of(step)):
                batch = self._part(step_images, part)
                # A process without images would not take part where the others wait for it. It
                # computes one, which weighs nothing.
                batch = batch if len(batch) else step_images[:1]
                yield [Draw(index, self.epoch) for index in batch.tolist()]


class TrainingImages(Dataset[tuple[Any, Any, tuple[str, ...]]]):
    """Training examples by `Draw`; the next one replaces an image that cannot be read."""

    def __init__(self, examples: Any, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __getitem__(self, draw: Draw) -> tuple[Any, Any, tuple[str, ...]]:
        skipped: list[str] = []
        count = len(self.examples)
        for index in ((draw.image + further) % count for further in range(count)):
            # Anew for each image, so that it does not matter which worker reads it, or what before.
            seed_everything(seed_of("image", self.seed, draw.epoch, index))
            try:
                image, label = self.examples[index]
            except UnreadableImageError as error:
                skipped.append(error.path)
            else:
                return image, label, tuple(skipped)
        raise DataError("none of the training images can be read.", found=skipped[0])


class HeldOutImages(Dataset[Any]):
    """Held-out examples, every `processes`-th, beginning with the one numbered `process`.

    With `skip`, None and the path stand in the place of an image that cannot be read.
    """

    def __init__(self, examples: Any, process: int, processes: int, *, skip: bool) -> None:
        self.examples, self.skip = examples, skip
        self.indices = range(process, len(examples), processes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        try:
            image, label = self.examples[self.indices[index]]
        except UnreadableImageError as error:
            if not self.skip:
                raise
            return None, None, (error.path,)
        return image, label, ()


def collate(items: list[Any]) -> Batch:
    """Stack the images that were read; of a batch of held-out images there may be none."""
    skipped = tuple(path for *_, paths in items for path in paths)
    read = [(image, label) for image, label, _ in items if image is not None]
    if not read:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), skipped)
    images, target = default_collate(read)
    return Batch(images, target, skipped)


def training_loader(data: Data, order: Order, workers: int = 0) -> DataLoader[Batch]:
    """Load batches of training images in an order; 0 workers prepare them in this process."""
    return _loader(TrainingImages(data.train, order.seed), workers, batch_sampler=order)


def held_out_loader(
    examples: Examples,
    batch_size: int,
    *,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    skip: bool = False,
) -> DataLoader[Batch]:
    """Load batches of held-out images, in the order of the data set.

    Args:
        examples: the images and classes.
        batch_size: images per batch.
        workers: processes that prepare images; 0 prepares them in this one.
        process: of those that divide the images, from 0.
        processes: how many divide the images.
        skip: leave out images that cannot be read, and name them; else they are an error.
    """
    images = HeldOutImages(examples, process, processes, skip=skip)
    return _loader(images, workers, batch_size=batch_size)


def noting(batches: Iterable[Batch], skipped: set[str]) -> Iterator[Batch]:
    """Pass batches on, and add their images that could not be read to a set."""
    for batch in batches:
        skipped.update(batch.skipped)
        yield batch


def check_skipped(skipped: Collection[str], allowed: int) -> None:
    """Raise DataError if more images could not be read than a recipe allows."""
    if len(skipped) > allowed:
        raise DataError(
            f"{len(skipped)} image{'s'[: len(skipped) > 1]} cannot be read.",
            expected=f"at most {allowed} (skip_corrupt)",
            found=joined(sorted(skipped), 5),
            next_step="Replace or remove them, or allow more: skip_corrupt=100.",
        )


class TimedBatches(Iterator[Batch]):
    """Batches, and the seconds that were spent waiting for them."""

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
    """Leave it to the trainer to stop the run: a terminal sends Ctrl-C to a group of processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGTERM may be sent to the group too, but a worker that ignored it could not be ended.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
