"""The paper's base network for ImageNet (Table 3): a MobileNetV2 of width 1.4."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from treeify.errors import ModelError
from treeify.models.cifar_resnet import check_blocks

STEM_CHANNELS = 24
BLOCK_CHANNELS = (32, 48, 88, 136, 224)
LAST_CHANNELS = 1344
HIDDEN_FEATURES = 1792
LAYERS = (2, 3, 4, 3, 3)
STRIDES = (2, 2, 2, 1, 2)
EXPANSION = 6


class MobileNetV2(nn.Module):
    """The base model of the paper's ImageNet ensembles, which split at `block2` to `block5`.

    Not the MobileNetV2-1.4 of timm or torchvision: those begin with 48 channels and end in a single
    linear layer. Weights are initialised as torchvision's are; every branch's are, too, if
    `hierarchicalize` gets the name `treeify.models:mobilenetv2_hne` and not an instance.

    Args:
        num_classes: classes `K`.
        width: factor on every channel count; 1 is the paper's network.
        layers: inverted residuals per block.
        strides: stride of each block, 1 or 2. Table 3 prints 2 for block 4, its own resolutions and
            MobileNetV2 say 1.

    Raises:
        ModelError: the width leaves a fractional channel, or layers and strides do not describe
            five non-empty blocks.

    Source: Ruiz & Verbeek, AAAI 2021, Table 3.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        layers: Sequence[int] = LAYERS,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        valid = min(layers, default=0) >= 1
        check_blocks("layers", layers, BLOCK_CHANNELS, "integers of at least 1", valid)
        valid = set(strides) <= {1, 2}
        check_blocks("strides", strides, BLOCK_CHANNELS, "strides of 1 or 2", valid)
        first = _scaled(STEM_CHANNELS, width)
        self.stem = nn.Sequential(
            Conv2dNormActivation(3, first, stride=2, activation_layer=nn.ReLU6),
            Conv2dNormActivation(first, first, groups=first, activation_layer=nn.ReLU6),
        )
        outputs = [_scaled(channels, width) for channels in BLOCK_CHANNELS]
        inputs = [first, *outputs[:-1]]
        blocks = map(_block, inputs, outputs, layers, strides)
        self.block1, self.block2, self.block3, self.block4, self.block5 = blocks
        last, hidden = _scaled(LAST_CHANNELS, width), _scaled(HIDDEN_FEATURES, width)
        self.conv = Conv2dNormActivation(outputs[-1], last, 1, activation_layer=nn.ReLU6)
        self.head = nn.Sequential(
            nn.Linear(last, hidden), nn.ReLU6(), nn.Linear(hidden, num_classes)
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, K]."""
        x = self.block1(self.stem(x))
        x = self.block5(self.block4(self.block3(self.block2(x))))
        logits: Tensor = self.head(self.conv(x).mean((2, 3)))
        return logits


# The name that recipes and saved ensembles hold.
mobilenetv2_hne = MobileNetV2


def _block(inputs: int, outputs: int, layers: int, stride: int) -> nn.Sequential:
    first = InvertedResidual(inputs, outputs, stride, EXPANSION)
    others = (InvertedResidual(outputs, outputs, 1, EXPANSION) for _ in range(layers - 1))
    return nn.Sequential(first, *others)


def _initialize(module: nn.Module) -> None:
    """Torchvision's scheme, which leaves batch norms as they are; no convolution has a bias."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def _scaled(channels: int, width: float) -> int:
    scaled = channels * width
    if scaled < 1 or scaled % 1:
        raise ModelError(
            f"width {width} gives {scaled:g} channels where the paper has {channels}.",
            expected="a whole number of channels",
            next_step="Use a multiple of 0.125, e.g. 0.25, 0.5 or 1.",
        )
    return int(scaled)
