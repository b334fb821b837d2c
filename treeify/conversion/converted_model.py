"""What an ensemble knows of its base model: the graphs, the architecture, the images it takes."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from treeify.arguments import require_integer
from treeify.engine.memory import free_bytes
from treeify.tracing.trace import Traced


class ConvertedModel(nn.Module):
    """A module that stands for a base model.

    Args:
        traced: the base model, traced.
    """

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self._traced = traced

    @property
    def traced(self) -> Traced:
        """The base model, traced."""
        return self._traced

    @property
    def skeleton(self) -> nn.Module:
        """The untouched base architecture on the meta device, without weights."""
        return self._traced.skeleton

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The base model's `group_matcher`, if it has one, for timm's layer decay."""
        return self.skeleton.group_matcher  # type: ignore[return-value]

    @property
    def no_weight_decay(self) -> Callable[[], Any]:
        """The base model's `no_weight_decay`, if it has one: names of parameters, for timm."""
        return self.skeleton.no_weight_decay  # type: ignore[return-value]

    @property
    def example(self) -> tuple[int, ...]:
        """The shape of an image `(C, H, W)` that the ensemble was converted for."""
        return self._traced.example

    def example_images(self, count: int) -> Tensor:
        """Random images of the example's shape, `[count, C, H, W]`, on the ensemble's device.

        Raises:
            InputError: the count is no integer of at least 0, or there is no memory for so many.
        """
        like = next(self.parameters())
        most = free_bytes(like.device) // (prod(self.example) * like.element_size())
        require_integer("count", count, 0, most)
        return torch.rand(count, *self.example, device=like.device, dtype=like.dtype)
