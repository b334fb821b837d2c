"""MACs of what runs, on devices with values and without."""

import pytest
import torch
from torch import nn

from treeify.tracing.mac_counter import MacCounter, frozen_parameters


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_torch_runs_as_one_operation_is_counted_too(device: str) -> None:
    """On a CPU torch has one operation for all of attention; a matrix may be given a vector."""
    x = torch.rand(1, 2, 7, 5, device=device)
    with torch.no_grad(), MacCounter() as counter:
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        x @ x[0, 0, 0]
    assert counter.macs == 2 * (2 * 7 * 7 * 5) + 2 * 7 * 5


def test_the_fast_path_of_attention_is_off_within() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.rand(1, 5, 8)
    with torch.no_grad(), MacCounter() as counter:
        layer(x)
    assert counter.macs == 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_batch_norms_count_by_their_scale_and_the_norm_within_an_instance_norm_does_not() -> None:
    x = torch.zeros(2, 4, 5, 5)
    for norm, each in (
        (nn.BatchNorm2d(4), 2),
        (nn.BatchNorm2d(4, affine=False), 1),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 0),
    ):
        with MacCounter() as counter:
            norm.eval()(x)
        assert counter.macs == each * x.numel()
        with MacCounter() as counter:
            norm.train()(x)
        assert counter.macs == 0


def test_parameters_are_frozen_for_a_while() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with frozen_parameters(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 2 + [False] * 2
