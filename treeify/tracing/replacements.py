"""Functions of libraries that fx records as one call, in operations that rules can run packed.

`treeify.verify` compares them with the libraries' functions, which the leaves' networks run.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import mvitv2
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, fx
from torchvision.models import swin_transformer


def _geometry(
    x: Tensor, window: Sequence[int], shift: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Height and width padded to whole windows, and the shifts where there is more than one."""
    padded = [side + -side % size for side, size in zip(x.shape[1:3], window, strict=True)]
    sides = zip(shift, padded, window, strict=True)
    return padded, [step if side > size else 0 for step, side, size in sides]


def _partitioned(x: Tensor, window: Sequence[int]) -> Tensor:
    rows = torch.unflatten(torch.unflatten(x, 2, (-1, window[1])), 1, (-1, window[0]))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@fx.wrap
def cut(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Shifted windows of images, `[N, H, W, C] -> [N, windows, tokens, C]`."""
    (height, width), by = _geometry(x, window, shift)
    x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if any(by):
        x = torch.roll(x, (-by[0], -by[1]), (1, 2))
    return _partitioned(x, window)


@fx.wrap
def join(x: Tensor, images: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of `cut`, for windows of `images`: `[N, windows, tokens, C] -> [N, H, W, C]`."""
    (height, _), by = _geometry(images, window, shift)
    rows = torch.unflatten(torch.unflatten(x, 2, window), 1, (height // window[0], -1))
    x = rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(by):
        x = torch.roll(x, (by[0], by[1]), (1, 2))
    return x[:, : images.shape[1], : images.shape[2]].contiguous()


@fx.wrap
def masked(scores: Tensor, images: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Attention scores, `[N, windows, heads, tokens, tokens]`, without those of rolled neighbours.

    In shifted windows at an edge, tokens that the roll has brought from the other side of the image
    do not see the others.
    """
    padded, by = _geometry(images, window, shift)
    if not any(by):
        return scores
    regions = []
    for side, size, step in zip(padded, window, by, strict=True):
        places = torch.arange(side, device=scores.device)
        regions.append((places >= side - size).long() + (places >= side - step).long())
    region = _partitioned((3 * regions[0][:, None] + regions[1])[None, :, :, None], window)
    apart = region[0] != region[0].transpose(1, 2)
    return scores + scores.new_zeros(apart.shape).masked_fill(apart, -100.0).unsqueeze(1)


@fx.wrap
def scaled(query: Tensor) -> Tensor:
    """Queries over the root of their length, `[N, ..., D]`."""
    return query * float(query.shape[-1] ** -0.5)


@fx.wrap
def without_keys(bias: Tensor) -> Tensor:
    """Biases of queries, keys and values, `[3*C]`, with those of the keys 0."""
    query, key, value = bias.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def _shifted_window_attention(
    input: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """Torchvision's attention within shifted windows, `[N, H, W, C] -> [N, H, W, C]`."""
    if logit_scale is not None and qkv_bias is not None:
        qkv_bias = without_keys(qkv_bias)
    qkv = F.linear(cut(input, window_size, shift_size), qkv_weight, qkv_bias)
    parts = qkv.chunk(3, -1)
    query, key, value = (
        torch.unflatten(parts[index], -1, (num_heads, -1)).transpose(2, 3) for index in range(3)
    )
    if logit_scale is None:
        scores = scaled(query) @ key.transpose(-2, -1)
    else:
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    scores = masked(scores + relative_position_bias, input, window_size, shift_size)
    attention = F.dropout(F.softmax(scores, dim=-1), p=attention_dropout, training=training)
    tokens = F.linear((attention @ value).transpose(2, 3).flatten(3), proj_weight, proj_bias)
    tokens = F.dropout(tokens, p=dropout, training=training)
    return join(tokens, input, window_size, shift_size)


@fx.wrap
def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """Attention without a softmax, `[N, heads, T, D]`, at least in float32.

    `value` has a last column of ones: that of the products is what the others are divided by.
    """
    device = query.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        sums = query.float() @ (key.float().transpose(-1, -2) @ value.float())
        return (sums[..., :-1] / (sums[..., -1:] + eps)).to(value.dtype)


def _lite_mla(module: LiteMLA, x: Tensor) -> Tensor:
    """The forward of timm's `LiteMLA`, `[N, C, H, W] -> [N, C, H, W]`."""
    images, _, height, width = x.shape
    first = module.qkv(x)
    scales = torch.cat([first, *(scale(first) for scale in module.aggreg)], dim=1)
    tokens = scales.reshape(images, -1, 3 * module.dim, height * width).transpose(-1, -2)
    query, key, value = tokens.chunk(3, dim=-1)
    query, key = module.kernel_func(query), module.kernel_func(key)
    tokens = linear_attention(query, key, F.pad(value, (0, 1), value=1.0), module.eps)
    result: Tensor = module.proj(tokens.transpose(-1, -2).reshape(images, -1, height, width))
    return result


# Functions that timm has marked as not to be traced into, and that this tracer gets through.
TRACED_ANYWAY = (mvitv2.reshape_pre_pool, mvitv2.reshape_post_pool, mvitv2.cal_rel_pos_type)
# Functions, and the forward methods of modules.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    swin_transformer.shifted_window_attention: _shifted_window_attention,
    LiteMLA.forward: _lite_mla,
}
# Functions in them, or called as they are, that treat every image by itself.
OF_EACH_IMAGE = (cut, join, masked, scaled, linear_attention, swin_transformer._patch_merging_pad)
