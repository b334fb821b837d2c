"""The paper's base network for CIFAR (Table 2): a ResNet-50 with depthwise bottlenecks."""

from collections.abc import Sequence

from torch import Tensor, nn

from treeify.errors import ModelError

STEM_CHANNELS = (16, 64)
BLOCK_CHANNELS = (64, 128, 256, 256)
DEPTH_50 = (3, 4, 4, 5)
STRIDES = (1, 2, 2, 1)
BOTTLENECK = 4


class Bottleneck(nn.Module):
    """One layer: 1x1 reduction, depthwise 3x3, 1x1 expansion, added to the input or a shortcut.

    The bottleneck has a quarter of the output's channels; the shortcut, a 1x1 convolution with
    batch norm, has the stride of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, shortcut: bool) -> None:
        super().__init__()
        narrow = outputs // BOTTLENECK
        self.conv1 = nn.Conv2d(inputs, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, groups=narrow, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if shortcut:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        out: Tensor = self.relu(residual + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """The base model of the paper's CIFAR ensembles, which split at `block1` to `block4`.

    The first layer of every block has a shortcut convolution even where no shape changes, so that
    branches differ from their first layer on.

    Args:
        num_classes: classes `K`.
        width: factor on every channel count; 1 is the paper's HNE, 0.5 its HNE_small.
        layers: bottlenecks per block; (3, 4, 4, 5) is depth 50.
        strides: stride of each block. Table 2 prints 2 for block 4, its own resolutions say 1.

    Raises:
        ModelError: the width leaves a fractional channel, or layers and strides do not describe
            four non-empty blocks.

    Source: Ruiz & Verbeek, AAAI 2021, Table 2.
    """

    def __init__(
        self,
        num_classes: int = 100,
        width: float = 1.0,
        layers: Sequence[int] = DEPTH_50,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        kind = "integers of at least 1"
        check_blocks("layers", layers, BLOCK_CHANNELS, kind, min(layers, default=0) >= 1)
        check_blocks("strides", strides, BLOCK_CHANNELS, kind, min(strides, default=0) >= 1)
        first, second = (_scaled(channels, width) for channels in STEM_CHANNELS)
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(),
        )
        outputs = [_scaled(channels, width) for channels in BLOCK_CHANNELS]
        inputs = [second, *outputs[:-1]]
        blocks = map(_block, inputs, outputs, layers, strides)
        self.block1, self.block2, self.block3, self.block4 = blocks
        self.head = nn.Linear(outputs[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, K]."""
        x = self.stem(x)
        x = self.block4(self.block3(self.block2(self.block1(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


# The name that recipes and saved ensembles hold.
cifar_resnet50 = CifarResNet


def _block(inputs: int, outputs: int, layers: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, outputs, stride=stride, shortcut=True)
    others = (Bottleneck(outputs, outputs, stride=1, shortcut=False) for _ in range(layers - 1))
    return nn.Sequential(first, *others)


def check_blocks(
    name: str, values: Sequence[int], blocks: Sequence[int], kind: str, valid: bool
) -> None:
    """Raise ModelError unless values are valid and as many as a network's blocks."""
    if len(values) != len(blocks) or not valid:
        raise ModelError(
            f"{name} does not describe the network's blocks.",
            expected=f"{len(blocks)} {kind}",
            found=f"{list(values)}",
        )


def _scaled(channels: int, width: float) -> int:
    scaled = channels * width
    if scaled < BOTTLENECK or scaled % BOTTLENECK:
        raise ModelError(
            f"width {width} gives {scaled:g} channels where the paper has {channels}.",
            expected=f"a multiple of {BOTTLENECK}, for bottlenecks of a quarter of the channels",
            next_step="Use a multiple of 0.25, e.g. 0.25, 0.5 or 1.",
        )
    return int(scaled)
