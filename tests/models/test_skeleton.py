"""Models without memory for their weights."""

import pytest
import torch
from torch import nn

from treeify.errors import ModelError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.skeleton import ParametersOnMeta, skeleton


class Reading(nn.Module):
    """Its constructor reads a weight, which has no values on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.scale = float(self.layer.weight.detach().new_ones(1))


@pytest.mark.parametrize(
    "name", ["resnet10t", "torchvision/squeezenet1_1", "test_skeleton:Reading"]
)
def test_a_skeleton_is_the_model_without_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    model = skeleton(Architecture(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert fingerprint(model) == fingerprint(Architecture(name).build())


def test_only_layers_are_put_on_the_meta_device() -> None:
    """Constructors compute widths and rates with tensors of their own."""
    with ParametersOnMeta():
        layer = nn.Linear(3, 3)
        rates = torch.linspace(0, 1, 3).tolist()
    assert layer.weight.is_meta
    assert rates == [0, 0.5, 1]


def test_an_unknown_name_has_none() -> None:
    with pytest.raises(ModelError, match="there is no model"):
        skeleton(Architecture("resnet1O"))
