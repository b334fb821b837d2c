"""Operations for the tests of rules: those with a rule, and those that a rule must refuse."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d, ScaledStdConv2d, StdConv2d
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame
from torch import Tensor, nn

WIDTH = 4


class Around(nn.Module):
    """A split, then one operation on `[N, 4, 6, 6]` of every branch, then its output as it is."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.before = nn.Conv2d(WIDTH, WIDTH, 1)
        self.operation = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.before(self.stem(x)))


class Tokens(nn.Module):
    """A module on tokens `[N, 36, 4]`, with a class token and a place for each token."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 37, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.places
        return (tokens + self.module(tokens))[:, 0]


class OwnWeights(nn.Module):
    """Functional layers on parameters that the forward pass reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.linear(x, self.weight, self.bias) * self.scale
        return mixed + torch.matmul(x, self.weight)


class Attend(nn.Module):
    """Attention, by torch's function or spelled out, with a bias for every pair of tokens."""

    def __init__(self, *, bias: bool, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.RMSNorm(2)
        self.bias = nn.Parameter(torch.randn(2, 37, 37)) if bias else None
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.norm(q)
        if self.fused:
            mask = None if self.bias is None else self.bias.unsqueeze(0)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-2, -1)
            scores = scores if self.bias is None else scores + self.bias
            mixed = scores.softmax(dim=-1) @ v
        return mixed.transpose(1, 2).reshape(n, t, c)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Windows(nn.Module):
    """Shifted windows of 3x3, each through a linear layer: `[N, 4, 6, 6] -> [N, 6, 6, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).roll((1, 1), dims=(1, 2))
        n, h, w, c = x.shape
        windows = x.view(n, h // 3, 3, w // 3, 3, c).transpose(2, 3).reshape(-1, 9, c)
        windows = self.norm(self.linear(windows))
        whole = windows.shape[0] // (h * w // 9)
        x = windows.view(whole, h // 3, w // 3, 3, 3, -1).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, h, w, -1)


class Routed(nn.Module):
    """A convolution of three experts, mixed for every image."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.conv = CondConv2d(WIDTH, 6, 3, num_experts=3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.router(x.mean((2, 3))).sigmoid())


class Heads(nn.Module):
    """Two rows for each image, of half of its channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 2, 6, 6)
        return self.norm(self.conv(rows)).reshape(-1, 6, 9)


class TokenNorm(nn.Module):
    """A batch norm over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def replace_parts(x: Tensor) -> Tensor:
    """Parts of every image by others of it, and by a number."""
    made = x + 1
    made[:, 1:, ..., 2:4] = x[:, :3, :, :2]
    made[:, 0, 1] = 0.5
    made[..., -1, 0] = x.mean((2, 3))
    return made


class OwnFunctions(nn.Module):
    """A convolution, norms and bounds with weights that the forward pass reads or computes."""

    def __init__(self, *, standardised: bool) -> None:
        super().__init__()
        self.standardised = standardised
        self.kernel = nn.Parameter(torch.randn(8, 2, 3, 3))
        self.shift = nn.Parameter(torch.randn(8))
        self.scales = nn.ParameterList(torch.randn(8) for _ in range(4))
        self.whole = nn.Parameter(torch.randn(3, 8))
        self.register_buffer("low", torch.tensor(-0.5))
        self.register_buffer("high", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel
        if self.standardised:
            kernel = kernel / kernel.std((1, 2, 3), keepdim=True)
        x = F.conv2d(x, kernel, self.shift, stride=2, padding=1, groups=2)
        x = F.group_norm(x, 4, self.scales[0], self.scales[1]) + F.group_norm(x, 2)
        x = torch.clamp(x, self.low, self.high).clamp(None, self.high)
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, (8,), self.scales[2], self.scales[3], 1e-3) + F.layer_norm(
            x, x.shape[3:]
        )
        x = F.layer_norm(x, (3, 8), weight=self.whole)
        x = F.rms_norm(x, [8], self.scales[0], 1e-3) + F.rms_norm(x, [8], weight=self.scales[1])
        return x.clamp(self.low)


class SharedKernel(nn.Module):
    """A convolution with weights that no branch has of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.full((WIDTH, 1, 3, 3), 0.1, dtype=x.dtype), groups=WIDTH)


class ShiftedNorm(nn.Module):
    """A norm with a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (6,), None, self.bias)


class SetsOwn(nn.Module):
    """Replaces a part of every image by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        x[:, 0] = self.part
        return x


def replace_image(x: Tensor) -> Tensor:
    """One image by zeros."""
    x = x + 1
    x[0] = 0.0
    return x


def gram(x: Tensor) -> Tensor:
    """Products of channels, for which branches are in the batch: `[N, 4, 6, 6] -> [N, 4, 4]`."""
    return x.flatten(2) @ x.flatten(2).transpose(1, 2)


def replace_by_images(x: Tensor) -> Tensor:
    """A part of every image by how many there are."""
    x = x + 1
    x[:, 0] = x.shape[0]
    return x


class Tables(nn.Module):
    """Products with tables of its own, of images held first and in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(6, 5, WIDTH))
        self.mixing = nn.Parameter(torch.randn(WIDTH, 3))
        self.scale = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("nahw,na,hka->nahk", x, self.scale, self.rows).permute(1, 0, 2, 3)
        steps = torch.arange(25, dtype=x.dtype).view(5, 5)
        return torch.einsum("cnhk, cd, kl -> dnhl", x, self.mixing, steps).transpose(0, 1)


class Do(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "conv1x1": lambda: nn.Conv2d(WIDTH, 6, 1),
    "conv_grouped": lambda: nn.Conv2d(WIDTH, 6, 3, stride=2, padding=1, groups=2),
    "conv_depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False),
    "conv_circular": lambda: nn.Conv2d(WIDTH, 3, 3, padding=1, padding_mode="circular"),
    "conv_transposed": lambda: nn.ConvTranspose2d(WIDTH, 6, 3, stride=2, groups=2),
    "conv_same": lambda: Conv2dSame(WIDTH, 5, 3, stride=2),
    "conv_standardised": lambda: StdConv2d(WIDTH, 5, 3),
    "conv_scaled_standardised": lambda: ScaledStdConv2d(WIDTH, 5, 3),
    "conv_of_experts": lambda: Routed(groups=2, bias=True),
    "conv_of_experts_same": lambda: Routed(stride=2, padding="same"),
    "batch_norm": lambda: nn.BatchNorm2d(WIDTH),
    "batch_norm_act": lambda: BatchNormAct2d(WIDTH),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "group_norm_act": lambda: GroupNormAct(WIDTH, num_groups=2),
    "instance_norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "layer_norm_channels": lambda: LayerNorm2d(WIDTH),
    "layer_norm_last": lambda: nn.LayerNorm(6),
    "layer_norm_all": lambda: nn.LayerNorm([WIDTH, 6, 6]),
    "linear_last": lambda: nn.Linear(6, 5),
    "linear_vector": lambda: nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * 36, 5)),
    "prelu": lambda: nn.PReLU(),
    "prelu_channels": lambda: nn.PReLU(WIDTH),
    "silu": lambda: nn.SiLU(inplace=True),
    "max_pool": lambda: nn.MaxPool2d(3, 2, 1),
    "avg_pool_same": lambda: AvgPool2dSame(3, 2),
    "adaptive_pool": lambda: nn.AdaptiveAvgPool2d(2),
    "interpolate": lambda: Do(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    "pad": lambda: Do(lambda x: F.pad(x, (1, 2, 0, 1))),
    "pad_channels": lambda: Do(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))),
    "cat": lambda: Do(lambda x: torch.cat([x, x * 2, x[:, :1]], 1)),
    "cat_space": lambda: Do(lambda x: torch.cat([x, x * 2], dim=-1)),
    "chunk": lambda: Do(lambda x: x.chunk(2, dim=1)[0] - x.chunk(2, dim=1)[1]),
    "split": lambda: Do(lambda x: x.split([1, 3], dim=1)[1]),
    "mean_space": lambda: Do(lambda x: x.mean((2, 3))),
    "mean_channels": lambda: Do(lambda x: x * x.mean(1, keepdim=True)),
    "softmax_channels": lambda: Do(lambda x: x.softmax(dim=1)),
    "permute": lambda: Do(lambda x: x.permute(0, 2, 3, 1)),
    "flatten_tokens": lambda: Do(lambda x: x.flatten(2).transpose(1, 2)),
    "reshape": lambda: Do(lambda x: x.reshape(x.shape[0], 2, -1, 6) * x.size(1)),
    "shuffle": lambda: nn.ChannelShuffle(2),
    "pixel_shuffle": lambda: nn.PixelShuffle(2),
    "matmul": lambda: Do(lambda x: x @ x.transpose(-2, -1)),
    "einsum": lambda: Do(lambda x: torch.einsum("nchw,ncwv->nhv", x, x)),
    "einsum_tables": Tables,
    "rows_of_heads": Heads,
    "tokens_batch_norm": lambda: Tokens(TokenNorm()),
    "set_item": lambda: Do(replace_parts),
    "own_functions": lambda: OwnFunctions(standardised=False),
    "unfold": lambda: Do(lambda x: x.unfold(2, 3, 2).unfold(3, 2, 1)),
    "repeat_each": lambda: Do(
        lambda x: (x.repeat_interleave(4, 0) * 2).view(x.shape[0], -1, 4, 6, 6)
    ),
    "tokens_linear": lambda: Tokens(nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 4))),
    "tokens_own_weights": lambda: Tokens(OwnWeights()),
    "tokens_conv": lambda: Tokens(nn.Conv1d(37, 37, 3, padding=1)),
    "attention": lambda: Tokens(Attend(bias=False, fused=True)),
    "attention_spelled_out": lambda: Tokens(Attend(bias=True, fused=False)),
    "self_attention": lambda: Tokens(SelfAttention()),
    "windows": Windows,
    # In the batch a number of images is multiplied by the branches: these leave it.
    "narrow_by_images": lambda: Do(lambda x: gram(x).narrow(1, x.shape[0], 1)),
    "index_by_images": lambda: Do(lambda x: gram(x)[:, x.shape[0]]),
    "roll_by_images": lambda: Do(lambda x: gram(x).roll(x.shape[0], 1)),
}
# Packed, but for small operations on parameters alone.
MOSTLY: dict[str, Callable[[], nn.Module]] = {
    "attention_bias": lambda: Tokens(Attend(bias=True, fused=True)),
    "standardised": lambda: OwnFunctions(standardised=True),
}


# What a rule must refuse: it works across the images, or takes dim 1 for something else.
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "softmax_batch": lambda: Do(lambda x: x.softmax(0)),
    "softmax_batch_module": lambda: nn.Softmax(dim=-4),
    "flip_batch": lambda: Do(lambda x: x.flip(0, 1)),
    "roll_batch": lambda: Do(lambda x: x.roll(1, 0)),
    "roll_everything": lambda: Do(lambda x: torch.roll(x, 1)),
    "normalize_batch": lambda: Do(lambda x: F.normalize(x, dim=-4)),
    "pool_without_channels": lambda: Do(lambda x: F.max_pool2d(x.flatten(2), 2)),
    "flatten_batch": lambda: Do(lambda x: x.flatten(0, 1)[: x.shape[0]].unflatten(0, (-1, 1))),
    "index_batch": lambda: Do(lambda x: x[torch.tensor([1, 0])]),
    "mean_batch": lambda: Do(lambda x: x - x.mean(0, keepdim=True)),
    "set_image": lambda: Do(replace_image),
    "set_own": SetsOwn,
    "set_images": lambda: Do(replace_by_images),
    "shared_kernel": SharedKernel,
    "shifted_norm": ShiftedNorm,
    "einsum_images": lambda: Do(lambda x: torch.einsum("nchw,mchw->n", x, x)[:, None]),
    "unfold_batch": lambda: Do(lambda x: x.unfold(0, 2, 1)[:1].repeat(x.shape[0], 1, 1, 1, 1)),
    "repeat_image": lambda: Do(
        lambda x: x.repeat_interleave(torch.tensor([2, 1, 0])[: x.shape[0]], 0)
    ),
}
CASES = {**OPERATIONS, **MOSTLY, **REFUSED}
