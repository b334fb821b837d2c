"""Eleven small networks, each with one family of traps: what real models do rarely, or all at once.

Every one maps [N, 3, 16, 16] to [N, 5] and has parts `stage1` to `stage4` to split at. Their
parameters are randomised further than PyTorch does, so that no scale, shift or token is 0 or 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, fx, nn

CLASSES = 5
WIDTH = 8


def conv(inputs: int = WIDTH, outputs: int = WIDTH, **kwargs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **kwargs),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Head(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class SharedWeights(nn.Module):
    """One module at two places of a level and of two levels; two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = conv()
        self.stage2 = conv()
        self.stage3 = nn.Conv2d(WIDTH, WIDTH, 1)
        self.stage4 = nn.Conv2d(WIDTH, WIDTH, 1)
        self.stage4.weight = self.stage3.weight
        self.norm = nn.BatchNorm2d(WIDTH)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.stage1(self.stage1(x))
        x = self.norm(self.stage2(x))
        x = self.stage3(x).relu()
        x = self.stem[1](self.stage4(x))
        return self.head(x)


class InPlace(nn.Module):
    """Operations that overwrite a value which siblings, or later lines, still read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(nn.ReLU(inplace=True), conv())
        self.stage2 = conv()
        self.stage3 = conv()
        self.stage4 = nn.Sequential(nn.SiLU(inplace=True), conv())
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        # Each value changed in place is one whose backward pass does not need it unchanged.
        x = (self.stem(x) * 1.5).sub_(0.2)
        y = self.stage1(x) + 0.1
        y += x  # x went through stage1's in-place ReLU
        y.mul_(0.5)
        z = self.stage2(y) - 0.1
        self.relu(z.add_(y, alpha=-0.3))  # the result is z itself
        z = self.stage3(z) + z
        x = F.hardswish(z, inplace=True)
        return self.head(self.stage4(x) + x + y)


class LongSkips(nn.Module):
    """Values that jump several levels: tensors, shapes, numbers and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = conv(stride=2)
        self.stage2 = conv()
        self.stage3 = conv()
        self.stage4 = conv(2 * WIDTH)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        batch, channels = stem.shape[:2]
        size = stem.shape[-2:]
        left, right = stem.chunk(2, dim=1)
        a = self.stage1(stem)
        b = self.stage2(a)
        c = self.stage3(b) + a
        c = F.interpolate(c, size=size)
        skip = torch.cat((right, left), dim=1)
        x = self.stage4(torch.cat((c, skip), dim=1))
        x = x.reshape(batch, channels, size[0], size[1])
        x = x + 0.1 * channels * F.interpolate(a, scale_factor=2.0)
        return self.head(x)


class DirectParameters(nn.Module):
    """Tokens, positions and scales read without a module; modules and buffers nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.register_buffer("offset", torch.randn(WIDTH), persistent=False)
        self.stage1 = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.0)
        self.stage2 = nn.Linear(WIDTH, WIDTH)
        self.scale2 = nn.Parameter(torch.randn(WIDTH))
        self.stage3 = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.stage4 = nn.LayerNorm(WIDTH)
        self.never_called = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = self.stage1(x)
        x = x + self.scale2 * self.stage2(x)
        x = x + self.stage3(x, x, x, need_weights=False)[0]
        x = self.stage4(x + self.offset)
        return self.head(x[:, 0]) / self.temperature


class FunctionalDropout(nn.Module):
    """Calls that read `self.training`; rates of 0 or 1 keep the outcome certain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = conv()
        self.stage2 = nn.Sequential(nn.Dropout(0.0), conv(), nn.Dropout2d(0.0))
        self.stage3 = conv()
        self.stage4 = conv()
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.stem(x), 0.0, self.training)
        # All of this branch is dropped in training: a frozen flag would show.
        x = x + F.dropout(self.stage1(x), p=1.0, training=self.training)
        x = self.stage2(x)
        if self.training:
            x = x * 0.9
        x = F.batch_norm(self.stage3(x), None, None, training=True)
        x = F.dropout2d(self.stage4(x), 0.0, training=self.training) + x
        return self.head(x)


class ScaledConv(nn.Conv2d):
    """A convolution that does more than its base class; traced through, since it is no leaf."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return 0.5 * self._conv_forward(x, weight, self.bias) + x.mean(1, keepdim=True)


@register_notrace_module
class OpaqueConv(nn.Conv2d):
    """A convolution that does more, in a way that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.flip(1) if bool(torch.isfinite(y).all()) else y


@register_notrace_module
class OpaqueNorm(nn.BatchNorm2d):
    """A batch norm with an activation inside and a step counter of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return F.gelu(super().forward(x)) + x.amax(1, keepdim=True)


class OpaqueSubclasses(nn.Module):
    """Subclasses that must not be taken for the class they extend."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = ScaledConv(WIDTH, WIDTH, 3, padding=1)
        self.stage2 = OpaqueNorm(WIDTH)
        self.stage3 = OpaqueConv(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.stage4 = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.GELU(approximate="tanh"))
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))))


class ManyOutputs(nn.Module):
    """A dict with a nested tuple: auxiliary logits leave at a lower level than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = conv()
        self.stage2 = conv()
        self.stage3 = conv()
        self.stage4 = conv()
        self.aux_stem = Head()
        self.aux = Head()
        self.head = Head()

    def forward(self, x: Tensor) -> dict[str, object]:
        x = self.stem(x)
        early = self.aux_stem(x)
        x = self.stage2(self.stage1(x))
        middle = self.aux(x)
        return {"logits": self.head(self.stage4(self.stage3(x))), "aux": (early, middle)}


class ChannelOperations(nn.Module):
    """Operations on dim 1, where packed branches lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = conv()
        self.stage2 = conv(2 * WIDTH)
        self.stage3 = conv()
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.stage4 = conv()
        self.gain = nn.Parameter(torch.randn(WIDTH, 1, 1))
        self.head = nn.Linear(WIDTH + 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.stage1(x)
        first, second = y.chunk(2, dim=1)
        x = torch.cat((x, second * first, first), 1)
        x = self.stage2(x)
        x = x.softmax(1) * x.shape[1] + x[:, :1] - x[:, -3:].sum(1, keepdim=True)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).flip(2).flatten(1, 2)
        x = self.stage3(x)
        pooled = torch.cat((x.mean(1, keepdim=True), x.amax(1, True)), dim=1)
        x = x * torch.sigmoid(self.spatial(pooled))
        x = self.stage4(x) * self.gain
        weights = x.flatten(2).sum(-1).softmax(dim=-1)
        x = x * weights[:, :, None, None]
        small, large = x.mean((2, 3)).aminmax(dim=1, keepdim=True)
        return self.head(torch.cat([x.mean([-2, -1]), small, large], dim=-1))


class Norms(nn.Module):
    """Normalisation per branch, cumulative averages, no statistics, and 0-d state."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH))
        self.stage2 = nn.Sequential(nn.BatchNorm2d(WIDTH, momentum=None), nn.PReLU(WIDTH))
        self.stage3 = nn.Sequential(
            nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True),
            nn.BatchNorm2d(WIDTH, affine=False),
            nn.PReLU(),
            nn.LocalResponseNorm(3),
        )
        self.stage4 = nn.LayerNorm([WIDTH, 16, 16])
        self.plain = nn.BatchNorm2d(WIDTH, track_running_stats=False)
        self.register_buffer("gain", torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(0.3))
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        x = self.stage3(x) * self.gain
        x = self.plain(self.stage4(x) + self.shift)
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.normalize(x.mean((2, 3)), dim=1))


class Grouped(nn.Module):
    """What stands first after a split: depthwise, grouped, shuffled, transposed, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=WIDTH)
        self.stage2 = nn.Conv2d(2 * WIDTH, WIDTH, 1, groups=2, padding_mode="reflect")
        self.stage3 = nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1, groups=2)
        self.shuffle = nn.ChannelShuffle(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.stage4 = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x)).relu()
        batch, channels, height, width = x.shape
        x = x.view(batch, 4, channels // 4, height, width).transpose(1, 2).contiguous()
        x = self.stage2(x.view(batch, channels, height, width))
        x = self.shuffle(self.stage3(x))
        x = F.pixel_unshuffle(x, 2)[:, ::4]
        x = self.stage4(torch.flatten(self.pool(x), 1))
        return self.head(torch.tanh(x))


@fx.wrap  # type: ignore[untyped-decorator]
def along_rows(x: Tensor) -> Tensor:
    """A function that tracing leaves alone, and that has to be given dense images."""
    batch, channels, height, width = x.shape
    return x.view(batch * channels * height, width).cumsum(1).view(x.shape) / width


class AlongColumns(nn.Module):
    """A module that stops the tracer, likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = -x
        return self.mix(x.view(x.shape[0], 1, -1)).view(x.shape)


class Views(nn.Module):
    """Views of images, traced and not: they need the memory laid out as in the base model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.stage1 = nn.Sequential(conv(), AlongColumns())
        self.stage2 = conv()
        self.stage3 = conv()
        self.stage4 = nn.Conv2d(WIDTH, WIDTH, 3, stride=4, padding=1)
        self.hidden = nn.Linear(WIDTH * 16, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        x = self.stage2(x + along_rows(x))
        single = x.view(size=(-1, x.shape[2], x.shape[3]))
        x = self.stage3(single.roll(1, 1).view_as(x))
        x = self.stage4(x).relu()
        return self.head(self.hidden(x.view(x.size(0), -1)).relu())


MODELS: tuple[type[nn.Module], ...] = (
    SharedWeights,
    InPlace,
    LongSkips,
    DirectParameters,
    FunctionalDropout,
    OpaqueSubclasses,
    ManyOutputs,
    ChannelOperations,
    Norms,
    Grouped,
    Views,
)


def builder(model: type[nn.Module]) -> Callable[[], nn.Module]:
    """A function that builds the model with no parameter left at 0 or 1."""

    def build() -> nn.Module:
        made = model()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return made

    return build
