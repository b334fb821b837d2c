"""A module's modes and buffers are put back."""

import pytest
import torch
from torch import nn

from treeify.engine.preserve import preserve_buffers, preserve_modes


def network() -> nn.Sequential:
    """A model in training with a frozen batch norm inside."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    return model


@pytest.mark.parametrize("training", [True, False])
def test_every_module_gets_its_own_mode_back(training: bool) -> None:
    model = network()
    with preserve_modes(model):
        model.train(training)
        assert [module.training for module in model.modules()] == [training] * 4
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_modes_come_back_after_an_error() -> None:
    model = network()
    with pytest.raises(ZeroDivisionError), preserve_modes(model):
        model.eval()
        _ = 1 / 0
    assert model.training


def test_buffers_get_their_values_back() -> None:
    norm = nn.BatchNorm2d(3)
    before = {name: (buffer, buffer.clone()) for name, buffer in norm.named_buffers()}
    with preserve_buffers(norm):
        norm(torch.rand(4, 3, 2, 2))
        norm.running_var = torch.full((3,), 7.0)
        assert norm.running_mean.any()
    for name, (buffer, values) in before.items():
        assert norm.get_buffer(name) is buffer
        torch.testing.assert_close(buffer, values, rtol=0, atol=0)
