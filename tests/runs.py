"""A run of seconds on a sixth of the digits, and how to stop and compare such runs."""

import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from treeify.cli.app import main
from treeify.data import Data
from treeify.training.events import Epoch, Reporter, RunSize, Step
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import dump_recipe, load_recipe

RECIPE = """\
name: tiny
model:
  name: treeify.models:cifar_resnet50
  kwargs: {num_classes: 10, width: 0.25, layers: [1, 1, 1, 1]}
  splits: [block3, block4]
data: {name: digits, held_out: 1497}
loss: {name: hierarchical_distillation}
optimizer: {lr: 0.05}
schedule: {epochs: 2}
batch_size: 100
"""
# Whatever has a state or is random, so that losing it shows.
RICH = (
    "data.crop_padding=1",
    "schedule.warmup_epochs=0.5",
    "mix={mixup: 0.2, label_smoothing: 0.1}",
    "ema={decay: 0.9}",
    "batch_size=96",
    "threads=1",
    "device=cpu",
)
STEPS = 4  # of a rich epoch: 300 training images, 12 of them in the last step
TINY_STEPS = 3  # of an epoch of the recipe as it stands

# Has neither dropout nor batch norms, so it gives the same in any number of parts.
NORMLESS = """\
from torch import nn


def net(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""


def noise(*, train: int = 50, held_out: int = 20, size: int = 8) -> Data:
    """Random images of ten classes, [3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(train + held_out, 3, size, size, generator=generator)
    examples: Any = [(image, index % 10) for index, image in enumerate(images)]
    classes = tuple(map(str, range(10)))
    return Data(examples[:train], examples[train:], classes, f"{held_out} random images held out")


class Recorder(Reporter):
    """Notes what a run reports."""

    def __init__(self) -> None:
        self.events: list[RunSize | Step | Epoch] = []
        self.started = self.stepped = self.finished_epoch = self.events.append

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


class InterruptAt(Reporter):
    """Presses Ctrl-C after some step of the run."""

    def __init__(self, step: int) -> None:
        self.left = step

    def stepped(self, step: Step) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


def tiny(folder: Path) -> Path:
    """The recipe as it stands, in a file."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def written(folder: Path, *overrides: str) -> Path:
    """The rich recipe as a file in a folder, with overrides in it."""
    path = tiny(folder)
    path.write_text(dump_recipe(load_recipe(path, [*RICH, *overrides])))
    return path


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(written(folder, *overrides))


def photos(folder: Path, size: int = 16, each: int = 8) -> Path:
    """Folders of dark and of light images, to train on and held out."""
    for part in ("train", "val"):
        for name, shade in (("dark", 0), ("light", 255)):
            (folder / part / name).mkdir(parents=True)
            for index in range(each):
                image = Image.new("RGB", (size, size), (shade, shade, index))
                image.save(folder / part / name / f"{index}.png")
    return folder


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


def assert_same_bits(run: Path, other: Path, name: str = "last") -> None:
    one, two = weights(run, name), weights(other, name)
    assert one.keys() == two.keys()
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different


def command(*arguments: Any, processes: int = 1) -> list[str]:
    """`treeify train` in one process or several."""
    start = ["-m", "treeify"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start = [*torchrun, str(processes), *start]
    return [sys.executable, *start, "train", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread and wide lines."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(*arguments: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command's end."""
    return subprocess.run(
        command(*arguments, **options),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def forked(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process forked off a server that has imported everything; it begins in a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["treeify.training.trainer"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def ends(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Their exit codes; None for one that goes on for five minutes, and is killed."""
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def run_in_two(*arguments: Any, cwd: Path) -> list[int | None]:
    """The exit codes of `treeify train` in two processes, told of each other as torchrun does."""
    port = free_port()
    return ends([forked(_take_part, rank, port, cwd, *arguments) for rank in range(2)])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def told_apart(*arguments: Any, cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """The ends of `treeify train` in two processes that nothing but their own network ends."""
    port = free_port()
    started = [
        subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env={**environment(), **_ranks(rank, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, output)
        for process, output in zip(started, outputs, strict=True)
    ]


def _take_part(rank: int, port: int, cwd: Path, *arguments: Any) -> None:
    os.environ |= _ranks(rank, port)
    train_in(cwd, *arguments)


def _ranks(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells one of two processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def killed(file: Path, owner: str, name: str, count: int, after: bool) -> int | None:
    """The exit code of `treeify train` that dies at some call, in `run` beside the recipe."""
    (code,) = ends([forked(_die, file, owner, name, count, after)])
    return code


def _die(file: Path, owner: str, name: str, count: int, after: bool) -> None:
    """Train until a function is called for the n-th time; then kill this process with -9."""
    namespace = pkgutil.resolve_name(owner)
    original, calls = getattr(namespace, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        result = original(*args, **kwargs) if after or len(calls) < count else None
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(namespace, name, dying)
    train_in(file.parent, file, "--out", "run")


def train_in(cwd: Path, *arguments: Any) -> None:
    """`treeify train` in a folder, where its own modules may lie too."""
    # As for a command. The workers that the server forks do not notice that this process is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = ["treeify", "train", *map(str, arguments)]
    main()
