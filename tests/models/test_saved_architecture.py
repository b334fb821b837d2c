"""What a directory may choose among, and what only the user may."""

import json
from typing import Any

import pytest

import treeify.models
from treeify.errors import CheckpointError, ModelError
from treeify.models.architecture import Architecture
from treeify.models.saved_architecture import is_trusted, saved_architecture, without_weights


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet18.a1_in1k", "timm/resnet18", "torchvision/resnet18"]
    + [f"treeify.models:{name}" for name in treeify.models.__all__],
)
def test_models_of_the_libraries_and_the_papers_need_no_trust(name: str) -> None:
    assert is_trusted(name)
    data = {"name": name, "kwargs": {"num_classes": 3}}
    assert saved_architecture(data, "dir", trust=False) == Architecture(name, {"num_classes": 3})


@pytest.mark.parametrize(
    "name",
    ["os:system", "hf-hub:a/b", "treeify.models:cifar_resnet", "treeify.models.shallow:build"],
)
def test_a_function_is_named_in_the_message_and_built_with_trust(name: str) -> None:
    data = {"name": name, "kwargs": {"pretrained": True}}
    with pytest.raises(CheckpointError, match=f"dir names .*'{name}' would be imported"):
        saved_architecture(data, "dir", trust=False)
    assert saved_architecture(data, "dir", trust=True).kwargs == {"pretrained": True}


def test_arguments_that_name_weights_are_dropped_however_deep_for_libraries_only() -> None:
    kwargs: dict[str, Any] = {"num_classes": 3, "checkpoint_path": "a.pth", "pretrained": True}
    kwargs |= {"pretrained_cfg_overlay": {"file": "a.pth"}, "weights": "DEFAULT"}
    kwargs |= {"pretrained_cfg": {"url": "http://x", "num_classes": 3, "more": [{"hf_hub_id": 1}]}}
    kept = {"num_classes": 3, "pretrained_cfg": {"num_classes": 3, "more": [{}]}}
    assert without_weights(Architecture("resnet18", kwargs)).kwargs == kept
    data = {"name": "resnet18", "kwargs": kwargs}
    for trust in (False, True):  # what is read has none; what is built drops them once more
        assert saved_architecture(data, "dir", trust=trust).kwargs == kept
    assert without_weights(Architecture("mine:net", kwargs)).kwargs == kwargs
    window = {"pretrained_window_sizes": [8, 8, 8, 6], "weight_init": "jax"}
    assert without_weights(Architecture("swinv2_tiny_window8_256", window)).kwargs == window


@pytest.mark.parametrize(
    "data",
    [
        *(None, {}, {"name": 1, "kwargs": {}}, {"name": "x" * 300, "kwargs": {}}),
        {"name": "x", "kwargs": {"a": json.loads("[" * 30 + "]" * 30)}},
    ],
)
def test_what_describes_no_architecture_is_refused(data: Any) -> None:
    with pytest.raises(ModelError, match=r"not a description|names no model"):
        saved_architecture(data, "dir", trust=True)
