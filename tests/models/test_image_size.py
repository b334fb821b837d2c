"""What images a model is fed, and how it is built for others."""

from typing import Any

import pytest
import torch

from treeify.errors import InputError
from treeify.models.architecture import Architecture
from treeify.models.image_size import example_shape, height_and_width, resized
from treeify.models.skeleton import skeleton


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        (Architecture("resnet18"), (3, 224, 224)),
        (Architecture("mobilenetv2_050", {"in_chans": 1}), (1, 224, 224)),
        (Architecture("vit_tiny_patch16_224", {"img_size": 64}), (3, 64, 64)),
        (Architecture("mixer_s32_224", {"img_size": [64, 96]}), (3, 64, 96)),
        (Architecture("inception_v3"), (3, 299, 299)),
        (Architecture("torchvision/inception_v3"), (3, 299, 299)),
        (Architecture("torchvision/vit_b_16", {"image_size": 32}), (3, 32, 32)),
        (Architecture("torchvision/squeezenet1_1"), (3, 224, 224)),
    ],
    ids=str,
)
def test_example_shape(architecture: Architecture, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert example_shape(architecture.build(), architecture) == shape


def test_resized_sets_the_size_only_where_a_model_has_one() -> None:
    for name, key in (
        ("vit_tiny_patch16_224", "img_size"),
        ("torchvision/vit_b_32", "image_size"),
        ("gcvit_xxtiny", "img_size"),  # keeps no record of it
        ("levit_128s", "img_size"),  # nor does this, whose class passes on what it is given
    ):
        architecture = Architecture(name)
        other = resized(architecture, architecture.build(), 64)
        assert other == Architecture(name, {key: 64})
        small = other.build()
        assert resized(other, small, 64) == other
        assert example_shape(small, other) == (3, 64, 64)
        assert small.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    # The last one takes any size, whatever timm notes, and has weights for the usual one.
    for name, size in (("resnet10t", 64), ("gcvit_xxtiny", 224), ("mvitv2_tiny", 256)):
        architecture = Architecture(name)
        assert resized(architecture, skeleton(architecture), size) == architecture


@pytest.mark.parametrize(
    "size",
    ["x", 2**31, [8, 10**30], "12", 0, -1, [8], [8, 8, 8], [8, 0], None, 1.5, True, [8.0, 8]],
)
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match=r"no height and width(.|\n)*224"):
        height_and_width(size)
