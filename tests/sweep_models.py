"""Models that fail in every way a sweep must survive; named `sweep_models:FUNCTION`, or CLASS."""

import mmap
import os
import signal
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Three layers, enough for two splits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=8)
        self.second = nn.Conv2d(4, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


class Changing(Tiny):
    """Gives another answer with every call, so that no parity can hold."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + torch.poisson(torch.ones_like(x))


class Nested(Tiny):
    """The same with two of its layers in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(self.second, nn.ReLU(), self.third)
        del self.second, self.third

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.first(x)).relu().mean((2, 3)))


class Stacked(Tiny):
    """Blocks of two shapes in a row, three of each."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 4, 4, 8, 8, 8]
        self.blocks = nn.ModuleList([nn.Conv2d(4, width, 1) for width in widths])
        self.last = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        for block in self.blocks:
            x = x + block(x)[:, :4]
        return self.head(self.last[1](x).mean((2, 3)))


class Counting(Stacked):
    """The same with a forward that counts on every block."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[5](self.first(x)).mean()


class Tied(Tiny):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight


class Masked(Tiny):
    """A buffer that is made empty and filled afterwards."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(4))
        self.mask.copy_(torch.arange(4))


def nested() -> nn.Module:
    """Passes, and can be split inside a module."""
    return Nested()


def tiny() -> nn.Module:
    """Passes."""
    return Tiny()


def another() -> nn.Module:
    """Passes too."""
    return Tiny()


def changing() -> nn.Module:
    """Converts and fails the checks."""
    return Changing()


def raising() -> nn.Module:
    """Cannot be built."""
    raise ValueError("no weights today")


def killed() -> nn.Module:
    """Ends its process as a crash or the system would."""
    os.kill(os.getpid(), signal.SIGKILL)
    return Tiny()


def hungry() -> nn.Module:
    """Asks for more memory than there is."""
    torch.empty(2**50, dtype=torch.uint8)
    return Tiny()


def deep(depth: int = 8) -> nn.Module:
    """Takes memory that its number of weights does not foretell, less with fewer blocks."""
    torch.empty(depth * 12 * 10**8, dtype=torch.uint8)
    model = Tiny()
    model.head = nn.Linear(4, depth)
    return model


def greedy(depth: int = 8) -> nn.Module:
    """Made with weights, it ends its process as the system would, less deep it does not."""
    model = Tiny()
    model.head = nn.Linear(4, depth)
    if depth > 4 and not model.head.weight.is_meta:
        os.kill(os.getpid(), signal.SIGKILL)
    return model


def mapping() -> nn.Module:
    """Maps more memory than there is, as opening a file of weights does."""
    mmap.mmap(-1, 2**46)
    return Tiny()


def wide() -> nn.Module:
    """Too large for a small memory, unless it has no weights."""
    model = Tiny()
    model.third = nn.Conv2d(4, 4 * 2**20, 1)
    model.head = nn.Linear(4 * 2**20, 5)
    return model


def endless() -> nn.Module:
    """Leaves its process number and a folder of its own in files, and never returns."""
    Path("endless.scratch").write_text(tempfile.mkdtemp(), encoding="utf-8")
    Path("endless.pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)
    return Tiny()


def exported(hne: nn.Module) -> None:
    """In the place of an export: passes if it is given an ensemble of four leaves."""
    assert hne(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 5)


def refused(hne: nn.Module) -> None:
    """Cannot export anything."""
    raise ValueError("a model\nof this kind cannot be exported")


def interrupted(hne: nn.Module) -> None:
    """Ends its process while it exports."""
    os.kill(os.getpid(), signal.SIGKILL)
