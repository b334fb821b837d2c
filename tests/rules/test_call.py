"""What a rule reads of a call, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operation_cases import Do
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.image_by_image import dims_of, run_along, to_batch_along
from treeify.tracing.trace import trace


def call_of(function: Callable[[Any], Any]) -> Call:
    """The last call of a function of images `[N, 3, 6, 6]`."""
    graph = trace(Do(function), torch.zeros(1, 3, 6, 6)).graphs[False]
    *_, node = (node for node in graph.nodes if node.op.startswith("call_"))
    return Call(node, None, None, branches=2, ratio=1, varying=frozenset(node.all_input_nodes))


@pytest.mark.parametrize(
    ("function", "position", "default", "dims"),
    [
        (lambda x: x.softmax(1), 1, None, (1,)),
        (lambda x: x.softmax(dim=-1), 1, None, (3,)),
        (lambda x: x.mean((2, -1)), 1, None, (2, 3)),
        (lambda x: x.flip(1, 2), 1, None, (1, 2)),
        (lambda x: x.flip((1, 2)), 1, None, (1, 2)),
        (lambda x: torch.roll(x, 1), 2, None, ()),
        (lambda x: torch.roll(x, (1, 2), dims=(2, 3)), 2, None, (2, 3)),
        (F.normalize, 2, 1, (1,)),
        (lambda x: x.transpose(0, 1).unbind(), 1, 0, (0,)),
    ],
)
def test_dims_of_a_call(
    function: Callable[[Any], Any], position: int, default: int | None, dims: tuple[int, ...]
) -> None:
    assert dims_of(call_of(function), 4, position, default) == dims


def test_dims_of_a_module() -> None:
    module = nn.Softmax(dim=-2)
    call = call_of(lambda x: x.softmax(1))
    assert dims_of(Call(call.node, module, module, 2, 1), 4, 1) == (2,)


@pytest.mark.parametrize("make_rule", [to_batch_along, run_along])
def test_the_batch_and_unknown_dims_are_refused(make_rule: Callable[[int], Any]) -> None:
    rule = make_rule(1)
    assert rule(call_of(lambda x: x.softmax(1))).target == "softmax"
    with pytest.raises(Unpackable, match="along the batch"):
        rule(call_of(lambda x: x.softmax(0)))
    with pytest.raises(Unpackable, match="not a constant"):
        rule(call_of(lambda x: x.flip(())))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.max_pool2d(x, 2), None),
        (lambda x: F.max_pool2d(x.flatten(2), 2), "no channel dim"),
        (lambda x: F.max_pool1d(x[:, :, 0], 2), None),
        (lambda x: F.dropout1d(x.mean((2, 3))), "no channel dim"),
        (lambda x: F.max_pool2d(x.transpose(0, 1), 2), "does not begin with the batch"),
    ],
)
def test_images_without_channels_are_refused(
    function: Callable[[Any], Any], reason: str | None
) -> None:
    call = call_of(function)
    if reason is None:
        call.require_rank()
    else:
        with pytest.raises(Unpackable, match=reason):
            call.require_rank()


def test_what_a_call_runs() -> None:
    call = call_of(lambda x: x.softmax(1))
    assert (call.kind, call.target, call.name) == ("softmax", "softmax", "softmax")
    module, packed = nn.Conv2d(2, 2, 1), nn.Conv2d(4, 4, 1)
    call = Call(call.node, module, packed, 2, 1)
    assert (call.kind, call.target, call.name) == (nn.Conv2d, packed, "Conv2d")
