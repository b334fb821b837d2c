"""One process or several: Accelerate's, and what they tell one another."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from treeify.errors import RecipeError, TreeifyError
from treeify.evaluation.metrics import Scores
from treeify.training.recipe import Recipe
from treeify.training.sync_batch_norm import is_distributed

T = TypeVar("T")

_PRECISIONS = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


class LostProcessError(TreeifyError):
    """A loader's worker or another process of the run died."""


def join(device: torch.device) -> PartialState:
    """This process among those of the run; connects them the first time.

    Args:
        device: of the recipe; one process may use one device after another.
    """
    if not is_distributed():
        AcceleratorState._reset_state(reset_partial_state=True)
    return PartialState(cpu=device.type == "cpu")


def leave() -> None:
    """End the connection to the run's other processes, if there are any, before this one ends."""
    if is_distributed():
        dist.destroy_process_group()


def broadcast(value: T) -> T:
    """What the first process calls this with; every process calls it."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


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


def accelerator(recipe: Recipe, device: torch.device, directory: Path) -> Accelerator:
    """Accelerate's, as the recipe wants it.

    Args:
        recipe: its precision, trackers and compile.
        device: which was resolved.
        directory: of the run, for trackers; it need not be there yet.

    Raises:
        RecipeError: the precision or a tracker is not there.
    """
    # One process may train several recipes; Accelerate keeps the first one's settings otherwise.
    AcceleratorState._reset_state()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        made = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=_PRECISIONS[recipe.precision],
            log_with=list(recipe.trackers) or None,
            project_dir=directory,
            dynamo_backend="inductor" if recipe.compile else None,
        )
    except ValueError as error:
        raise RecipeError(
            f"this run cannot be set up: {error}",
            next_step="Set precision=fp32, or other trackers.",
        ) from error
    there = {str(getattr(own, "value", getattr(own, "name", own))) for own in made.log_with}
    if missing := sorted(set(recipe.trackers) - there):
        raise RecipeError(
            f"trackers {', '.join(missing)} are not there.",
            next_step="Install them, e.g. pip install 'treeify[tensorboard]'.",
        )
    return made


def open_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Begin to report to what the recipe names."""
    if not recipe.trackers:
        return
    accelerator.init_trackers(recipe.name)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # it would take the configuration for another run
            tracker.store_init_configuration({"recipe": json.dumps(recipe.model_dump())})


class Team:
    """What the processes of a run agree on; each method is called by all of them.

    Args:
        accelerator: Accelerate's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device: torch.device = accelerator.device
        self.index: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    def sum(self, loss: Tensor, *flags: bool) -> tuple[float, tuple[bool, ...]]:
        """The sum of a number, and each flag that any of them raises."""
        if self.size == 1:
            return loss.item(), flags
        shared = torch.stack([loss, *(torch.full_like(loss, float(flag)) for flag in flags)])
        dist.all_reduce(shared)
        value, *raised = shared.tolist()
        return value, tuple(map(bool, raised))

    def any(self, wish: bool) -> bool:
        """Whether any of them wishes it."""
        return self.sum(torch.zeros((), device=self.device), wish)[1][0]

    def union(self, names: Iterable[str]) -> set[str]:
        """What any of them names."""
        found: list[str] = gather_object(sorted(names))
        return set(found)

    def together(self, scores: Scores) -> Scores:
        """The totals of all of them."""
        if self.size == 1:
            return scores
        totals = {
            name: total.to(self.device, copy=True) for name, total in scores.state_dict().items()
        }
        for total in totals.values():
            dist.all_reduce(total)
        combined = Scores(scores.tree)
        combined.load_state_dict(totals)
        return combined

    def share_buffers(self, *models: nn.Module) -> None:
        """Give all of them the running statistics of the first, whose models are saved."""
        if self.size > 1:
            for buffer in (own for model in models for own in model.buffers()):
                dist.broadcast(buffer, 0)


@contextmanager
def explained(next_step: Callable[[], str]) -> Iterator[None]:
    """Turn what a dead worker or process leaves behind into one clear message.

    Args:
        next_step: gives what the user can do.

    Raises:
        LostProcessError: one died.
        RuntimeError: anything else that went wrong, as it is.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = is_distributed() and any(word in text for word in ("Connection", "gloo", "NCCL"))
        if not (lost or "DataLoader worker (pid" in text or isinstance(error, dist.DistError)):
            raise
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            # torch's handler would raise again, anywhere, as the other workers end.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise LostProcessError(
            "a process of this run died.",
            found=text.splitlines()[0],
            next_step="Often memory ran out: see the system's log, or set fewer workers. "
            + next_step(),
        ) from error
