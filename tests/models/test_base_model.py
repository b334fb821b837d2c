"""Base models by name: classes, image sizes and seeds."""

import pytest
import torch

from treeify.errors import InputError, ModelError
from treeify.models.base_model import base_model


def test_a_size_is_that_of_the_example_and_of_models_that_have_one() -> None:
    base = base_model("test_vit", input_size=64)
    assert base.example.shape == (1, 3, 64, 64)
    assert base.architecture.kwargs == {"img_size": 64}
    assert base.model.eval()(base.example).shape == (1, 1000)
    wide = base_model("test_vit", input_size=(64, 96))
    assert wide.architecture.kwargs == {"img_size": [64, 96]}
    assert wide.model.eval()(wide.example).shape == (1, 1000)
    plain = base_model("torchvision/squeezenet1_1", num_classes=4, input_size=32)
    assert plain.example.shape == (1, 3, 32, 32)
    assert plain.architecture.kwargs == {"num_classes": 4}


def test_the_seed_decides_about_weights_and_the_callers_generator_stays() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (base_model("test_resnet", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    key = next(key for key, tensor in first.state_dict().items() if tensor.ndim == 4)
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    for seed in (-1, 2**63, 10**30):
        with pytest.raises(InputError, match="seed is no integer in range"):
            base_model("test_vit", seed=seed)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelError, match="resnet5O"):
        base_model("resnet5O")
