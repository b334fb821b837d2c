"""The models the parity tests sweep: real ones with small inputs and few classes, and odd ones.

A case costs what its inputs cost, so sizes are the smallest each model takes. What needs gigabytes
or minutes with 16 leaves is marked slow and runs with `pytest -m slow -n 0`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import odd_models
import timm
import torch
import torchvision
from timm.models.byobnet import ByoBlockCfg
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import VGG, make_layers

from treeify.parity.fresh_weights import settle

CLASSES = 10

# Four binary splits (16 leaves), one split of 4, and independent networks.
SHAPES = ("binary", "wide", "input")


@dataclass(frozen=True)
class Case:
    """A base model, the size it is fed and where it splits.

    Args:
        name: shown as the test's id.
        build: makes the model from torch's random state.
        size: height and width of its images.
        binary: four split points, from input to output, or how many to choose.
        wide: the one split of the tree with a single fanout of 4.
        slow: the tree shapes in which it takes gigabytes or the better part of a minute.
        ungraded: how many parameters reach no output in training mode, and so get no gradient.
        shapes: the tree shapes it is checked in; fewer only with a reason in the note.
        note: what is special about it.
    """

    name: str
    build: Callable[[], nn.Module]
    size: int
    binary: int | tuple[str, ...] = 4
    wide: str | None = None
    slow: tuple[str, ...] = ()
    ungraded: int = 0
    shapes: tuple[str, ...] = SHAPES
    note: str = ""

    def splits(self, shape: str = "binary") -> int | list[str]:
        """What to pass to `hierarchicalize` for one of `SHAPES`."""
        if shape == "input":
            return ["input:4"]
        if shape == "wide":
            name = self.wide or (self.binary[2] if isinstance(self.binary, tuple) else None)
            assert name is not None, f"{self.name} names no split for the wide tree"
            return [f"{name}:4"]
        return list(self.binary) if isinstance(self.binary, tuple) else self.binary

    def model(self, seed: int = 0, *, dropout: bool = False) -> nn.Module:
        """The base model, the same for the same seed, with statistics no model starts with.

        Args:
            seed: of the weights.
            dropout: keep the rates; without them outputs in training mode can be compared.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            settle(model)
        if not dropout:
            drop_nothing(model)
        return model

    def images(self, count: int = 2, seed: int = 1) -> Tensor:
        """Random images, [count, 3, size, size]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.size, self.size, generator=generator)

    def __str__(self) -> str:
        return self.name


def drop_nothing(model: nn.Module) -> None:
    """Set the rate of every dropout, stochastic depth or functional dropout to 0."""
    for module in model.modules():
        for key in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)


def cases(*, slow: bool | None = False) -> list[Case]:
    """The cases of the sweep.

    Args:
        slow: those slow in every shape, the others, or with None all.
    """
    return [case for case in CASES if slow is None or (case.slow == SHAPES) == slow]


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, **kwargs)


def _torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(torchvision.models.get_model, name, weights=None, num_classes=CLASSES, **kwargs)


def _thin_resnet() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1], num_classes=CLASSES)


def _thin_densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 3, 4, 2), 16, num_classes=CLASSES)


def _thin_vgg() -> nn.Module:
    widths = [16, "M", 32, "M", 48, 48, "M", 64, 64, "M", 64, 64, "M"]
    model = VGG(make_layers(widths, batch_norm=True), num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, CLASSES)
    )
    return model


def _thin_convnext() -> nn.Module:
    widths = (24, 48, 96, 192, None)
    stages = [
        CNBlockConfig(width, following, layers)
        for width, following, layers in zip(widths, widths[1:], (1, 1, 3, 1), strict=False)
    ]
    return torchvision.models.ConvNeXt(stages, num_classes=CLASSES)


def _thin_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=5,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=CLASSES,
    )


def _thin_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2, 2, 2],
        num_heads=[2, 2, 4, 4],
        window_size=[7, 7],
        num_classes=CLASSES,
    )


def _thin_mixer() -> nn.Module:
    return MlpMixer(CLASSES, img_size=64, patch_size=32, num_blocks=8, embed_dim=64)


_REPVGG_BLOCKS = tuple(
    ByoBlockCfg(type="rep", d=layers, c=width, s=2, gs=0)
    for layers, width in ((2, 24), (3, 48), (4, 96), (1, 160))
)

# Thin: the same code with fewer channels or layers, where 16 full leaves take gigabytes.
_THIN = [
    Case("resnet18-thin", _thin_resnet, 64, ("layer1", "layer2", "layer3", "layer4")),
    Case("repvgg_a0-thin", _timm("repvgg_a0", blocks=_REPVGG_BLOCKS), 64, wide="stages.3"),
    Case("densenet121-thin", _thin_densenet, 64, wide="features.denseblock4"),
    Case("vgg11_bn-thin", _thin_vgg, 64, wide="features.22"),
    Case("convnext_tiny-thin", _thin_convnext, 64, wide="features.7"),
    Case("vit_b_16-thin", _thin_vit, 32, wide="encoder.layers.encoder_layer_3"),
    Case("swin_t-thin", _thin_swin, 64, wide="features.7"),
    Case(
        "resnet50-thin",
        _timm("resnet50", layers=(1, 2, 2, 1), channels=(16, 32, 64, 128)),
        64,
        ("layer1", "layer2", "layer3", "layer4"),
    ),
    Case(
        "resnetv2_50-thin",
        _timm("resnetv2_50", layers=(1, 2, 2, 1), channels=(64, 128, 256, 512)),
        64,
        ("stages.0", "stages.1", "stages.2", "stages.3"),
    ),
    Case(
        "nfnet_l0-thin",
        _timm("nfnet_l0", depths=(1, 2, 2, 1), channels=(64, 128, 256, 256), group_size=16),
        64,
        ("stages.0", "stages.1", "stages.2", "stages.3"),
    ),
    Case(
        "dla34-thin",
        _timm("dla34", channels=(8, 16, 16, 32, 64, 128)),
        64,
        ("level2", "level3", "level4", "level5"),
    ),
    Case("mixer_s32_224-thin", _thin_mixer, 64, wide="blocks.6"),
]

_FULL = [
    Case("mobilenet_v2", _torchvision("mobilenet_v2"), 64, wide="features.14", slow=("binary",)),
    Case("mobilenet_v3_small", _torchvision("mobilenet_v3_small"), 64, wide="features.9"),
    Case("shufflenet_v2_x0_5", _torchvision("shufflenet_v2_x0_5"), 64, wide="stage4"),
    Case(
        "googlenet",
        _torchvision("googlenet", init_weights=False),
        64,
        wide="inception5a",
        slow=("binary",),
    ),
    Case("squeezenet1_1", _torchvision("squeezenet1_1"), 64, wide="classifier"),
    Case(
        "efficientnet_b0", _torchvision("efficientnet_b0"), 64, wide="features.7", slow=("binary",)
    ),
    Case(
        "regnet_y_400mf",
        _torchvision("regnet_y_400mf"),
        64,
        wide="trunk_output.block4",
        slow=("binary",),
    ),
    Case("mobilenetv2_140", _timm("mobilenetv2_140"), 64, wide="blocks.5", slow=("binary",)),
    Case("efficientnet_lite0", _timm("efficientnet_lite0"), 64, wide="blocks.5", slow=("binary",)),
    Case("ghostnet_100", _timm("ghostnet_100"), 64, wide="blocks.7", slow=("binary",)),
    Case(
        "hrnet_w18_small",
        _timm("hrnet_w18_small"),
        64,
        wide="incre_modules",
        slow=("binary", "input"),
    ),
    Case("vit_tiny_patch16_224", _timm("vit_tiny_patch16_224", img_size=32), 32, wide="blocks.8"),
]

# Gigabytes with 16 leaves (78 to 1,900 million parameters), or minutes to check.
_SLOW = [
    Case(
        "resnet18",
        _torchvision("resnet18"),
        64,
        ("layer1", "layer2", "layer3", "layer4"),
        slow=SHAPES,
    ),
    Case("repvgg_a0", _timm("repvgg_a0"), 64, wide="stages.3", slow=SHAPES),
    Case("densenet121", _torchvision("densenet121"), 64, wide="features.denseblock4", slow=SHAPES),
    Case(
        "vgg11_bn",
        _torchvision("vgg11_bn"),
        64,
        wide="classifier",
        slow=SHAPES,
        shapes=("wide", "input"),
        note="16 classifiers of 120 million parameters, with gradients and their sums: over 24 GB",
    ),
    Case("convnext_tiny", _torchvision("convnext_tiny"), 64, wide="features.7", slow=SHAPES),
    Case(
        "vit_b_16",
        _torchvision("vit_b_16", image_size=32),
        32,
        wide="encoder.layers.encoder_layer_9",
        slow=SHAPES,
        shapes=("wide", "input"),
        note="16 leaves, checked in float64 with gradients, take over 24 GB",
    ),
    Case("swin_t", _torchvision("swin_t"), 64, wide="features.7", slow=SHAPES),
    Case("resnet50", _timm("resnet50"), 64, wide="layer4", slow=SHAPES),
    Case("resnetv2_50", _timm("resnetv2_50"), 64, wide="stages.3", slow=SHAPES),
    Case("nfnet_l0", _timm("nfnet_l0"), 64, wide="stages.3", slow=SHAPES),
    Case("dla34", _timm("dla34"), 64, wide="level5", slow=SHAPES),
    Case("mixer_s32_224", _timm("mixer_s32_224", img_size=64), 64, wide="blocks.6", slow=SHAPES),
]

_ODD = [
    Case(
        f"odd-{model.__name__}",
        odd_models.builder(model),
        16,
        ("stage1", "stage2", "stage3", "stage4"),
        note=(model.__doc__ or "").splitlines()[0],
    )
    for model in odd_models.MODELS
]

CASES = (*_FULL, *_THIN, *_ODD, *_SLOW)
