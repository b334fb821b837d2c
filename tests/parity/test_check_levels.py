"""The memory there is decides how fully a model is checked."""

import pytest
from torch import nn

from treeify.models.architecture import Architecture
from treeify.parity.check_levels import CheckLevel, check_levels, estimated_bytes


def first_level(name: str, leaves: int, memory: int) -> CheckLevel:
    return next(check_levels(name, leaves, memory))


def test_the_memory_decides_how_a_model_is_checked() -> None:
    name = "vit_tiny_patch16_224"
    full = first_level(name, 4, 2**40)
    assert full.how == "full"
    assert full.shape == (3, 64, 64)
    assert full.architecture == Architecture(name, {"num_classes": 10, "img_size": 64})
    reduced = first_level(name, 4, full.estimate - 1)
    assert reduced.how == "reduced:blocks=4"
    assert len(reduced.architecture.build().blocks) == 4  # type: ignore[arg-type]
    assert reduced.estimate == full.estimate
    fewer = ["full", "reduced:blocks=4", "reduced:blocks=2", "reduced:blocks=1", "meta"]
    assert [level.how for level in check_levels(name, 4, full.estimate)] == fewer
    shallowest = first_level(name, 4, estimated_bytes(nn.Linear(1000, 1000, bias=False), 4))
    assert shallowest.how == "reduced:blocks=1"
    meta = first_level(name, 4, 1)
    assert meta.how == "meta"
    assert meta.architecture == Architecture(name)
    assert meta.shape == (3, 224, 224)
    one_block = Architecture(name, {"num_classes": 10, "img_size": 64, "depth": 1}).build()
    assert full.least is None
    assert meta.estimate == full.estimate
    assert meta.least == estimated_bytes(one_block, 4)
    assert estimated_bytes(nn.Identity(), 4) < full.estimate < first_level(name, 16, 2**40).estimate


def test_batch_norms_need_more_memory() -> None:
    """Under them float32 is too coarse, and the check ends up in float64."""
    layers = [nn.Linear(1000, 1000) for _ in range(10)]
    nothing, without = estimated_bytes(nn.Identity(), 4), estimated_bytes(nn.Sequential(*layers), 4)
    normed = estimated_bytes(nn.Sequential(*layers, nn.BatchNorm1d(1000)), 4)
    assert 1.7 < (normed - nothing) / (without - nothing) < 2


def test_batch_norms_average_more_than_two_numbers() -> None:
    """At 96 pixels, which it takes, the last maps of this one are a single pixel."""
    assert first_level("inception_v3", 4, 2**40).shape == (3, 128, 128)
    # The norm in its head has two at every size; at 64 pixels those of its last stage have as few.
    assert first_level("shvit_s2", 4, 2**40).shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("name", "blocks", "how"),
    [
        ("resnet18", "layers", "layers=[1, 1, 1, 1]"),
        ("swin_tiny_patch4_window7_224", "depths", "blocks=1"),
    ],
)
def test_a_shallower_model_keeps_its_stages(name: str, blocks: str, how: str) -> None:
    """With three stages the one can be built and does not run, the other does."""

    def memory(stages: int) -> int:
        made = Architecture(name, {"num_classes": 10, blocks: [1] * stages}).build()
        return estimated_bytes(made, 4)

    assert first_level(name, 4, memory(4)).how == f"reduced:{how}"
    assert first_level(name, 4, memory(3)).how == "meta"
