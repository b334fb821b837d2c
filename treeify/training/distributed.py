"""One process or several, connected by Accelerate, and what they agree on."""

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


class LostProcessError(TreeifyError):
    """A loader's worker or another process of the run died."""


def join(device: torch.device) -> PartialState:
    """Connect the processes of the run, unless they are; say which of them this one is."""
    if not is_distributed():
        # A process may train several recipes, each on another device.
        AcceleratorState._reset_state(reset_partial_state=True)
    return PartialState(cpu=device.type == "cpu")


def leave() -> None:
    """End the connection to the run's other processes, if there are any, before this one ends."""
    if is_distributed():
        dist.destroy_process_group()


def broadcast(value: T) -> T:
    """The value of the first process, in every process; each has to call this."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def from_first(compute: Callable[[], T]) -> T:
    """What a function returns, or the error it raises, in the first process; in every process."""
    value: T | TreeifyError | None = None
    if PartialState().is_main_process:
        try:
            value = compute()
        except TreeifyError as error:
            value = error
    value = broadcast(value)
    if isinstance(value, TreeifyError):
        raise value
    return value  # type: ignore[return-value]


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: this machine has no such device.
    """
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind, available in is_available.items() if available), "cpu"]
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            f"{name!r} is no device.", expected="auto, cpu, cuda, cuda:1 or mps"
        ) from error
    is_known = device.type not in is_available or device.type in available
    if not is_known or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise RecipeError(
            f"device {name!r} is not there.",
            expected=f"one of {', '.join(available)}",
            next_step="Set device=auto for the fastest one.",
        )
    return device


def accelerator(recipe: Recipe, device: torch.device, directory: Path) -> Accelerator:
    """Accelerate's handle on devices, precision and trackers; `directory` need not exist yet."""
    # Accelerate would keep the settings of the first recipe that this process trained.
    AcceleratorState._reset_state()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=recipe.precision if recipe.precision in ("bf16", "fp16") else "no",
            log_with=list(recipe.trackers) or None,
            project_dir=directory,
            dynamo_backend="inductor" if recipe.compile else None,
        )
    except ValueError as error:
        raise RecipeError(
            f"this run cannot be set up: {error}",
            next_step="Set precision=fp32, or other trackers.",
        ) from error
    # Accelerate leaves out what is not installed.
    installed = {str(getattr(entry, "value", entry)) for entry in accelerator.log_with}
    if missing := sorted(set(recipe.trackers) - installed):
        raise RecipeError(
            f"trackers {', '.join(missing)} are not installed.",
            next_step="Install them, e.g. pip install 'treeify[tensorboard]'.",
        )
    return accelerator


def open_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Begin to report to the trackers that a recipe names."""
    if not recipe.trackers:
        return
    accelerator.init_trackers(recipe.name)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # it would show the configuration as another run
            tracker.store_init_configuration({"recipe": json.dumps(recipe.model_dump())})


class Team:
    """What the processes of a run agree on; each method is called by all of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.device: torch.device = accelerator.device
        self.index: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    def sum(self, loss: Tensor, *flags: bool) -> tuple[float, tuple[bool, ...]]:
        """The sum of a number, and for each flag whether any process raises it.

        One message carries all: a message in every step is what processes wait for.
        """
        if self.size == 1:
            return loss.item(), flags
        numbers = torch.stack([loss, *(torch.full_like(loss, float(flag)) for flag in flags)])
        dist.all_reduce(numbers)
        value, *raised = numbers.tolist()
        return value, tuple(map(bool, raised))

    def any(self, flag: bool) -> bool:
        """Whether any process raises a flag."""
        return self.sum(torch.zeros((), device=self.device), flag)[1][0]

    def union(self, names: Iterable[str]) -> set[str]:
        """The names of all processes."""
        gathered: list[str] = gather_object(sorted(names))
        return set(gathered)

    def combine(self, scores: Scores) -> Scores:
        """The scores of all processes' images."""
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

    def broadcast_buffers(self, *models: nn.Module) -> None:
        """Give all processes the running statistics of the first, whose models are saved."""
        if self.size > 1:
            for buffer in (buffer for model in models for buffer in model.buffers()):
                dist.broadcast(buffer, 0)


@contextmanager
def explained(next_step: Callable[[], str]) -> Iterator[None]:
    """Turn the errors that a dead worker or process causes into a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # The error of the other side: gloo and NCCL only say that a connection was closed.
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
