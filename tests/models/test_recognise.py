"""Instances of library models get their names back; models of the user's own are left alone."""

from dataclasses import asdict

import odd_models
import pytest
import timm
import torch
import torchvision
from torch import nn

from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.recognise import recognise

NAMED = [
    Architecture("timm/resnet18", {"num_classes": 10}),
    Architecture("mobilenetv2_050", {"num_classes": 10, "in_chans": 1}),
    Architecture("resnet18.tv_in1k", {"num_classes": 3}),
    Architecture("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 10}),
    Architecture("mixer_s32_224", {"img_size": [64, 96]}),
    Architecture("resnet18", {"global_pool": "max", "drop_rate": 0.1}),
    Architecture("mobilenetv2_050", {"drop_path_rate": 0.1}),
    Architecture("torchvision/resnet18", {"num_classes": 10}),
    Architecture("torchvision/wide_resnet50_2", {"num_classes": 2}),
    Architecture("torchvision/mobilenet_v3_small", {"num_classes": 10}),
    Architecture("torchvision/efficientnet_b0", {"num_classes": 10}),
    Architecture("torchvision/regnet_y_400mf"),
    Architecture("torchvision/vgg11_bn", {"num_classes": 10}),
    Architecture("torchvision/vit_b_16", {"num_classes": 10, "image_size": 32, "dropout": 0.1}),
    Architecture("torchvision/googlenet"),
    Architecture("torchvision/googlenet", {"num_classes": 10, "aux_logits": False}),
    Architecture("torchvision/inception_v3", {"num_classes": 10}),
]


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_an_instance_gets_its_name_back(architecture: Architecture) -> None:
    model = architecture.build()
    before = torch.get_rng_state()
    found = recognise(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert found is not None
    assert found.name == architecture.name.removeprefix("timm/")
    assert fingerprint(found.build()) == fingerprint(model)
    assert Architecture.from_dict(asdict(found)) == found


@pytest.mark.parametrize("model", odd_models.MODELS)
def test_a_model_of_the_users_own_is_never_rebuilt(
    model: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model()
    monkeypatch.setattr(model, "__init__", lambda self: pytest.fail("rebuilt"))
    assert recognise(made) is None


def test_a_changed_model_has_no_name() -> None:
    model = timm.create_model("resnet18", num_classes=10)
    assert recognise(model) is not None
    model.layer1[0].act1 = nn.GELU()
    assert recognise(model) is None


def test_a_replaced_head_is_recognised_if_a_builder_makes_it() -> None:
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 7)
    assert recognise(model) == Architecture("torchvision/resnet18", {"num_classes": 7})


def test_frozen_and_evaluated_models_keep_their_name() -> None:
    model = timm.create_model("resnet18").eval().requires_grad_(False)
    assert recognise(model) == Architecture("resnet18")
    assert not model.training
