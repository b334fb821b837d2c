"""One model by its name: split, checked, saved and loaded."""

from typing import Any

import pytest
import torch

import treeify
from treeify.errors import ParityError
from treeify.models.architecture import Architecture
from treeify.parity.check_levels import check_levels
from treeify.parity.zoo_check import round_trip, verify_model


@pytest.mark.parametrize("memory", [8 * 10**9, 1], ids=["full", "meta"])
def test_a_model_is_split_inside_a_module_too(memory: int) -> None:
    row: dict[str, Any] = {}
    verify_model("sweep_models:nested", "1", memory, row.update)
    assert row["inner_split"] == "stage.1"
    assert row["how"] == ("meta" if memory == 1 else "full")
    assert ("inner_split" in row.get("deviations", {})) == (memory > 1)


def test_a_mistake_of_the_split_inside_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = treeify.HierarchicalEnsemble.run

    def broken(hne: treeify.HierarchicalEnsemble, *args: Any) -> Any:
        inside = any("." in name for name in hne.conversion.splits.names)
        return run(hne, *args) + inside

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    row: dict[str, Any] = {}
    with pytest.raises(ParityError):
        verify_model("sweep_models:nested", "1", 8 * 10**9, row.update)
    assert set(row["deviations"]) >= {"gradient", "round_trip"}


def test_splits_that_only_the_whole_model_has_are_checked_without_weights() -> None:
    row: dict[str, Any] = {}
    level = next(check_levels("vit_tiny_patch16_224", 2, 2**40))
    verify_model("vit_tiny_patch16_224", "blocks.8", level.estimate - 1, row.update)
    assert row["how"] == "meta"
    assert row["splits"] == ("blocks.8:2",)
    assert "deviations" not in row


def tiny() -> treeify.HierarchicalEnsemble:
    return treeify.hierarchicalize(
        Architecture("sweep_models:tiny"), 2, init="fresh", example_input=torch.zeros(1, 3, 16, 16)
    )


def test_a_round_trip_that_loses_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = tiny(), torch.rand(2, 3, 16, 16)
    hne.train().get_submodule("second").eval()
    assert round_trip(hne, x) == 0
    assert hne.training
    assert not hne.get_submodule("second").training

    original = treeify.load

    def load(path: str, *, trust: bool) -> treeify.HierarchicalEnsemble:
        loaded = original(path, trust=trust)
        with torch.no_grad():
            loaded.head.bias += 1
        return loaded

    monkeypatch.setattr("treeify.parity.zoo_check.checkpoint.load", load)
    with pytest.raises(ParityError, match=r"1 tensors changed .* head.bias"):
        round_trip(hne, x)


def test_a_round_trip_with_other_logits_from_the_same_tensors_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hne, x = tiny(), torch.rand(2, 3, 16, 16)
    original = treeify.load

    def load(path: str, *, trust: bool) -> treeify.HierarchicalEnsemble:
        loaded = original(path, trust=trust)
        loaded.register_forward_hook(lambda module, inputs, output: output + 1)
        return loaded

    monkeypatch.setattr("treeify.parity.zoo_check.checkpoint.load", load)
    with pytest.raises(ParityError, match="logits after save and load are off"):
        round_trip(hne, x)


def test_macs_are_counted_where_a_view_of_a_parameter_goes_into_a_layer() -> None:
    told: dict[str, object] = {}
    verify_model("test_vit3", "1", 8 * 10**9, told.update)
    assert told["macs"] is not None
