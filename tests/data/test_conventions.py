"""What libraries note of images is done to the same bits."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from treeify.data.conventions import of_trained_weights


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_small", "efficientnet_b3", "swin_v2_t", "vit_b_16"]
)
def test_torchvisions_ways_are_timms_in_other_words(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8)
    evaluation = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    (side,) = evaluation.crop_size
    preparation = of_trained_weights(f"torchvision/{name}", (3, side, side))
    assert preparation is not None
    image = Image.fromarray(noise)
    assert torch.equal(preparation(image), evaluation(image))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small:build", (3, 8, 8)),
        ("no_such_model", (3, 8, 8)),
        ("resnet18", (7,)),
        ("resnet18", (12, 8, 8)),
    ],
)
def test_of_other_models_and_inputs_nothing_is_known(name: str, shape: tuple[int, ...]) -> None:
    assert of_trained_weights(name, shape) is None
