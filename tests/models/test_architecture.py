"""Names build models, instances get their names back, and neither disturbs anything."""

import sys
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import odd_models
import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from treeify.errors import ModelError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.image_size import example_shape, resized
from treeify.models.recognise import recognise
from treeify.models.skeleton import skeleton

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


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Dropout(0.1))


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


@pytest.mark.parametrize("build", [*odd_models.MODELS, small], ids=lambda build: build.__name__)
def test_a_fingerprint_ignores_weights_and_mode(build: object) -> None:
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(1)
    second = build().eval().requires_grad_(False)
    assert fingerprint(first) == fingerprint(second)


def test_a_fingerprint_ignores_the_device() -> None:
    assert fingerprint(Plain()) == fingerprint(Plain().to("meta"))


class Plain(nn.Module):
    def __init__(self, rate: float = 0.1, act: object = torch.relu, buffer: bool = True) -> None:
        super().__init__()
        self.rate, self.act = rate, act
        self.register_buffer("scale", torch.ones(3), persistent=buffer)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)


def shared_module() -> nn.Module:
    model = Plain()
    model.second = model.first
    return model


def shared_weight() -> nn.Module:
    model = Plain()
    model.second.weight = model.first.weight
    return model


VARIANTS = {
    "plain": Plain,
    "rate": lambda: Plain(rate=0.2),
    "function": lambda: Plain(act=torch.tanh),
    "not saved": lambda: Plain(buffer=False),
    "shared module": shared_module,
    "shared weight": shared_weight,
    "dtype": lambda: Plain().double(),
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "stride": lambda: nn.Conv2d(4, 4, 3, stride=2),
    "groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "padding mode": lambda: nn.Conv2d(4, 4, 3, padding_mode="reflect"),
    "no bias": lambda: nn.Conv2d(4, 4, 3, bias=False),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "approximate gelu": lambda: nn.GELU("tanh"),
    "dropout": nn.Dropout,
    "less dropout": lambda: nn.Dropout(0.1),
}


def test_fingerprints_tell_structures_apart() -> None:
    prints = {name: fingerprint(build()) for name, build in VARIANTS.items()}
    assert len(set(prints.values())) == len(prints)


@given(st.integers(0, 2**31), st.sampled_from(["resnet10t", "torchvision/squeezenet1_1"]))
def test_building_uses_the_random_state_as_it_stands(seed: int, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = Architecture(name).build()
        torch.manual_seed(seed)
        second = Architecture(name).build()
    tensors = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in tensors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "Did you mean 'resnet50'"),
        ("timm/resnet5O", "Did you mean 'resnet50'"),
        ("googlenet", "Did you mean 'torchvision/googlenet'"),
        ("torchvision/resnet19", "'torchvision/resnet18'"),
        ("torchvision/fasterrcnn_resnet50_fpn", "there is no model"),
        ("", "there is no model"),
        ("no_such_package.models:small", "module 'no_such_package.models'"),
        ("odd_models:Groupped", "no function 'Groupped'(.|\n)*Did you mean 'Grouped'"),
        ("odd_models:WIDTH", "no function 'WIDTH'"),
        ("odd_models:", "no function ''"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Architecture(name).build()


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "odd_models:Grouped"])
def test_arguments_the_builder_refuses_are_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"could not be built(.|\n)*unexpected keyword.*depht"):
        Architecture(name, {"depht": 3}).build()


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(ModelError, match="Invalid pretrained tag"):
        Architecture("resnet18.nobody_in1k").build()


def test_functions_build_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\n\ndef tiny(width=4):\n    return nn.Conv2d(3, width, 1)\n"
    (tmp_path / "tiny_models.py").write_text(source)
    (tmp_path / "broken_models.py").write_text("import no_such_thing\n")
    (tmp_path / "odd_results.py").write_text("def name():\n    return 'resnet'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Architecture("tiny_models:tiny", {"width": 6}).build().out_channels == 6
    with pytest.raises(ModelError, match="No module named 'no_such_thing'"):
        Architecture("broken_models:tiny").build()
    with pytest.raises(ModelError, match=r"builds no model(.|\n)*Found str 'resnet'"):
        Architecture("odd_results:name").build()
    for module in ("tiny_models", "broken_models", "odd_results"):
        sys.modules.pop(module, None)


def test_arguments_that_are_no_json_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be written to a checkpoint"):
        Architecture("resnet18", {"norm_layer": nn.BatchNorm2d})


def test_arguments_are_those_json_gives_back() -> None:
    architecture = Architecture("vit_tiny_patch16_224", {"img_size": (64, 32)})
    assert architecture == Architecture.from_dict(asdict(architecture))
    assert str(architecture) == "vit_tiny_patch16_224(img_size=[64, 32])"


@pytest.mark.parametrize("data", [{}, {"name": 3, "kwargs": {}}, {"name": "x"}, "resnet18"])
def test_other_descriptions_are_refused(data: object) -> None:
    with pytest.raises(ModelError, match="not a description"):
        Architecture.from_dict(data)


def test_pretrained_without_network_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ModelError, match=r"could not be downloaded(.|\n)*leave pretrained out"):
        Architecture("torchvision/resnet18").build(pretrained=True)


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
