"""What a training run reports while it goes on, and its result."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.evaluation.metrics import Score


@dataclass(frozen=True)
class Step:
    """One training step, as reported.

    Args:
        epoch: its epoch, from 1.
        step: its number in the epoch, from 1.
        loss: of its batch.
        accuracy: of all leaves on this epoch's training images so far, in percent, in this process.
            Small batches are counted several at a time; not a number before the first are.
        lr: its learning rate.
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
        waiting: fraction of the training time spent waiting for images.
        loss: mean training loss.
        train: scores on the augmented training images while training, one per nested size.
        held_out: scores on the held-out images afterwards, one per nested size.
        skipped: images that could not be read, so far.
    """

    epoch: Annotated[int, Field(ge=1)]
    step: int
    seconds: float
    waiting: float
    loss: float
    train: Annotated[tuple[Score, ...], Field(min_length=1)]
    held_out: Annotated[tuple[Score, ...], Field(min_length=1)]
    skipped: int


@dataclass(frozen=True)
class RunSize:
    """What a run trains, and for how long, as reported.

    Args:
        directory: of the run.
        hne: the ensemble.
        data: what it is trained on.
        epochs: of the whole run.
        steps: per epoch.
        device: where the ensemble is.
        processes: how many divide the work.
        done: training steps so far; those of the process that was stopped, when a run goes on.
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
    """What has become of a run.

    Args:
        run: what it trained.
        last: the last finished epoch, None if none was.
        interrupted: Ctrl-C or a SIGTERM stopped it early; `last/` holds the state it stopped in.
    """

    run: RunSize
    last: Epoch | None
    interrupted: bool


class Reporter:
    """Hears how a run goes, in the main process; a subclass says what to do about it."""

    def started(self, run: RunSize) -> None:
        """Called before the first step."""

    def stepped(self, step: Step) -> None:
        """Called after every training step."""

    def finished_epoch(self, epoch: Epoch) -> None:
        """Called after an epoch was trained, measured and saved."""

    def warned(self, message: str) -> None:
        """Called when something is wrong, but the run goes on."""


# Lines of `metrics.jsonl`.
EPOCH = TypeAdapter(Epoch)


def flat(epoch: Epoch) -> dict[str, float]:
    """An epoch's numbers as trackers want them, e.g. `held_out/accuracy/16`."""
    numbers = {"loss": epoch.loss, "seconds": epoch.seconds, "waiting": epoch.waiting}
    for part in ("train", "held_out"):
        for score in getattr(epoch, part):
            figures = asdict(score)
            leaves = figures.pop("leaves")
            numbers |= {f"{part}/{name}/{leaves}": value for name, value in figures.items()}
    return numbers
