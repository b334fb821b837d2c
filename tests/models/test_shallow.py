"""Models with fewer blocks: whole, initialised, and checked as any other."""

import pytest
import sweep_models
import torch
from torch import nn

from treeify.errors import ModelError
from treeify.models import shallow
from treeify.models.architecture import Architecture
from treeify.models.skeleton import skeleton
from treeify.parity.check_levels import check_levels, estimated_bytes
from treeify.parity.zoo_check import verify_model


def built(model: str, blocks: int, **options: object) -> nn.Module:
    architecture = shallow.cut(Architecture(model, options), blocks)
    torch.manual_seed(0)
    return architecture.build()


@pytest.mark.parametrize(
    ("model", "blocks", "left"),
    [
        ("torchvision/vit_b_16", 2, {"encoder.layers": ["encoder_layer_0", "encoder_layer_1"]}),
        ("regnetx_004", 1, {"s3": ["b1", "b2"], "s4": ["b1", "b2"]}),
        ("darknet53", 3, {"stages.3.blocks": ["0", "1", "2"], "stages.0.blocks": ["0"]}),
        ("sweep_models:Stacked", 2, {"blocks": ["0", "1", "2", "3"]}),
        (
            "repvit_m0_9",
            2,
            {"stages.2.blocks": ["0", "1", "2", "3"], "stages.3.blocks": ["0", "1"]},
        ),
        ("gcvit_xxtiny", 1, {"stages.2.blocks": ["0", "1"]}),
    ],
)
def test_so_many_blocks_of_one_shape_are_left(
    model: str, blocks: int, left: dict[str, list[str]]
) -> None:
    made = built(model, blocks)
    for name, children in left.items():
        assert [key for key, _ in made.get_submodule(name).named_children()] == children
    full = Architecture(model).build()
    assert made.training
    assert type(made) is type(full)
    assert not any(own.is_meta for own in (*made.parameters(), *made.buffers()))
    for key, own in made.named_buffers():
        assert torch.equal(own, full.get_buffer(key)), key
    spread = {key: own.std().item() for key, own in full.named_parameters() if own.ndim > 1}
    for key, own in made.named_parameters():
        assert own.isfinite().all()
        if spread.get(key, 0) > 0:
            assert 0.1 < own.std().item() / spread[key] < 10, key
    assert made.eval()(torch.rand(1, 3, 224, 224)).isfinite().all()


def test_ordinary_modules_are_left_alone() -> None:
    """The two convolutions of a residual block are alike, and no sequence."""
    block = built("resnet18", 1).get_submodule("layer1")
    assert [key for key, _ in block.named_children()] == ["0"]
    assert {"conv1", "conv2"} <= {key for key, _ in block[0].named_children()}  # type: ignore[index]


def test_shared_weights_stay_shared() -> None:
    made = built("sweep_models:Tied", 1)
    assert made.first.weight is made.second.weight  # type: ignore[union-attr]


def test_buffers_that_a_constructor_computes_keep_their_values() -> None:
    """These are made empty and then filled, which on the meta device fills nothing."""
    made, full = built("sweep_models:Masked", 1), sweep_models.Masked()
    assert torch.equal(made.mask, full.mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["eva02_tiny_patch14_224", "swinv2_cr_tiny_ns_224"])
def test_buffers_that_modules_can_compute_take_no_full_model(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places, frequencies and masks: some are computed where a parameter of the module lies."""
    full = Architecture(model).build()
    assert any(own.is_meta for own in skeleton(Architecture(model)).buffers())
    calls, build = [], Architecture.build

    def counted(architecture: Architecture) -> nn.Module:
        calls.append(architecture.name)
        return build(architecture)

    monkeypatch.setattr(Architecture, "build", counted)
    made = built(model, 1)
    assert calls == [shallow.NAME, model]
    assert dict(made.named_buffers()).keys() < dict(full.named_buffers()).keys()
    for key, own in made.named_buffers():
        assert torch.equal(own, full.get_buffer(key)), key
    assert made.state_dict().keys() < full.state_dict().keys()
    calls.clear()
    bare = skeleton(shallow.cut(Architecture(model), 1))
    assert calls == [shallow.NAME, model]  # not once more, with weights
    assert all(own.is_meta for own in (*bare.parameters(), *bare.buffers()))


def test_a_shallower_model_has_a_skeleton() -> None:
    architecture = Architecture(shallow.NAME, {"model": "torchvision/vit_b_16", "blocks": 1})
    made = skeleton(architecture)
    assert all(own.is_meta for own in made.parameters())
    assert len(list(made.get_submodule("encoder.layers").children())) == 1


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ModelError, match="resnet1O"):
        built("resnet1O", 1)


def test_a_model_too_large_is_checked_without_its_spare_blocks() -> None:
    name = "sweep_models:Stacked"
    memory = estimated_bytes(sweep_models.Stacked(), 2) - 1
    row: dict[str, object] = {}
    verify_model(name, "1", memory, row.update)
    assert row["how"] == "reduced:blocks=2"
    assert row["arguments"] == {"model": name, "blocks": 2}
    assert (row["splits"], row["shallower_splits"]) == (("blocks:2",), ("second:2",))
    assert set(row["deviations"]) >= {"gradient", "round_trip"}  # type: ignore[call-overload]
    hows = [level.how for level in check_levels(name, 2, memory)]
    assert hows == ["reduced:blocks=2", "reduced:blocks=1", "meta"]


def test_a_model_that_counts_its_blocks_is_checked_whole_or_by_shapes() -> None:
    name = "sweep_models:Counting"
    memory = estimated_bytes(sweep_models.Counting(), 2) - 1
    assert [level.how for level in check_levels(name, 2, memory)] == ["meta"]
