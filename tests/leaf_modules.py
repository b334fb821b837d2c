"""Modules that cannot be traced into, for the tests of several rooms."""

import torch
from torch import Tensor, nn


class Counting(nn.Module):
    """Counts passes by assignment, which leaves no node behind, and lets the count matter.

    Args:
        channels: of images that come in and go out.
        evaluating: whether passes in evaluation mode count too.
    """

    def __init__(self, channels: int = 8, *, evaluating: bool = True) -> None:
        super().__init__()
        self.evaluating = evaluating
        self.conv = nn.Conv2d(channels, channels, 1)
        self.register_buffer("steps", torch.tensor(0.0))
        self.register_buffer("sum", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.evaluating:
            self.steps += 1
            self.sum = self.sum + 2 * self.steps
        return self.conv(x) * (1 + self.sum)
