"""Convolutions with many weights and few output pixels, as matrix products of their patches.

Where an image has shrunk to a few pixels, most of a convolution's training step is spent laying
out weights and their gradients for the kernel. A product of the image's patches takes them as they
lie: the whole training step of resnet18 at 64x64 becomes 1.5 to 2 times faster
(`benchmarks/shortcuts.py`).
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeify.rules.operations.linear import linear

# Beyond these bounds oneDNN's convolution is the faster one.
_MOST_PIXELS = 9
_LEAST_WEIGHTS = 2**20


def has_patches(conv: nn.Module) -> bool:
    """Whether a convolution can be a product: 2d, ungrouped, undilated, padded with zeros."""
    if type(conv) is not nn.Conv2d or not isinstance(conv.padding, tuple):
        return False
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and conv.kernel_size != (1, 1)


def pays(conv: Any, branches: int, x: Tensor) -> bool:
    """Whether the product is faster for these branches of `conv`, on an input `[N, ..., H, W]`."""
    # Who records a forward pass, to count MACs, wants to meet a convolution. Without gradients
    # there is nothing to gain: fused convolutions lay their weights out once (`treeify.fusion`).
    is_recorded = torch._C._get_tracing_state() is not None
    if is_recorded or x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if conv.weight.numel() * branches < _LEAST_WEIGHTS:
        return False
    height, width = (
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(
            x.shape[-2:], conv.padding, conv.kernel_size, conv.stride, strict=True
        )
    )
    return bool(height * width <= _MOST_PIXELS)


def convolve(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parents: int) -> Tensor:
    """A packed convolution as one product for each parent; `conv` is one branch's, for its options.

    `[N, P*C, H, W]` of `P` parents, and `[G*O, C, kernel, kernel]` and `[G*O]` of all their
    children -> `[N, G*O, H', W']`, channels last.
    """
    vertical, horizontal = conv.padding
    padded = F.pad(x, (horizontal, horizontal, vertical, vertical))
    patches = padded.unfold(2, conv.kernel_size[0], conv.stride[0])
    patches = patches.unfold(3, conv.kernel_size[1], conv.stride[1])
    patches = torch.unflatten(patches, 1, (parents, weight.shape[1]))
    # [N, P, C, H', W', kernel, kernel] in the order in which the weights lie in memory.
    if weight.is_contiguous():
        patches = patches.permute(1, 0, 3, 4, 2, 5, 6)
    else:
        patches = patches.permute(1, 0, 3, 4, 5, 6, 2)
        weight = weight.permute(0, 2, 3, 1)
    shape, inputs = patches.shape[:4], weight.shape[1:].numel()
    rows, columns = patches.reshape(prod(shape), inputs), weight.reshape(-1, inputs)
    product = linear(rows, columns, bias, parents)
    pixels = product.view(*shape, -1).permute(1, 2, 3, 0, 4).flatten(3, 4)
    return pixels.permute(0, 3, 1, 2)
