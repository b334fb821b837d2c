"""Graphs run without values, where norms and activations are answered for torch."""

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from treeify.tracing.meta_interpreter import RecordingInterpreter

# What a model might hand over: as it comes, channels last, tokens taken from images.
IMAGES = torch.zeros(2, 4, 5, 6)
INPUTS = {
    "plain": IMAGES,
    "channels last": IMAGES.contiguous(memory_format=torch.channels_last),
    "permuted": IMAGES.permute(0, 2, 3, 1),
    "part": IMAGES[:, :, 1:4, ::2],
    "half": IMAGES.bfloat16(),
}
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Softplus),
)
BATCH_NORMS = {
    "1d": (nn.BatchNorm1d(4), torch.zeros(2, 4)),
    "2d": (nn.BatchNorm2d(4), torch.zeros(2, 4, 5, 5).to(memory_format=torch.channels_last)),
    "3d": (nn.BatchNorm3d(4, affine=False), torch.zeros(2, 4, 3, 2, 2)),
    "no statistics": (nn.BatchNorm2d(4, track_running_stats=False), torch.zeros(2, 4, 5, 5)),
    "half": (nn.BatchNorm2d(4), torch.zeros(2, 4, 5, 5, dtype=torch.bfloat16)),
}


class Watched(RecordingInterpreter):
    """Keeps what its one module gives."""

    given: Tensor

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.given = super().call_module(target, args, kwargs)
        return self.given


def recorded(module: nn.Module, x: Tensor, *, count: bool = False) -> Watched:
    model = nn.Sequential(module).train(module.training)
    recorder = Watched(model, fx.symbolic_trace(model).graph, count=count)
    with torch.no_grad():
        recorder.run(x)
    return recorder


def given(module: nn.Module, x: Tensor) -> Tensor:
    return recorded(module, x).given


def assert_alike(found: Tensor, expected: Tensor) -> None:
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", BATCH_NORMS)
def test_batch_norms_give_what_torch_gives(case: str, training: bool) -> None:
    norm, x = (copy.deepcopy(own).to("meta") for own in BATCH_NORMS[case])
    with torch.no_grad():
        expected = norm.train(training)(x)
    assert_alike(given(norm, x), expected)


def test_values_are_computed_where_there_are_any() -> None:
    """Models that look at values run with them."""
    norm, x = nn.BatchNorm2d(3), torch.rand(2, 3, 4, 4)
    assert torch.equal(given(norm, x), norm(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", BATCH_NORMS)
def test_batch_norms_count_the_same_without_values(case: str, training: bool) -> None:
    norm, x = BATCH_NORMS[case]
    norm.train(training)
    real = recorded(copy.deepcopy(norm), x, count=True)
    meta = recorded(copy.deepcopy(norm).to("meta"), x.to("meta"), count=True)
    assert list(real.macs.values()) == list(meta.macs.values())
    has_statistics = norm.track_running_stats and not training
    each = 2 if norm.affine else 1
    assert sum(meta.macs.values()) == (each * x.numel() if has_statistics else 0)
    uncounted = recorded(copy.deepcopy(norm).to("meta"), x.to("meta"))
    assert sum(uncounted.macs.values()) == 0


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_give_what_torch_gives(kind: type[nn.Module], case: str) -> None:
    x = INPUTS[case].to("meta")
    assert_alike(given(kind(), x), kind()(INPUTS[case]))


@pytest.mark.parametrize(
    "kind", [kind for kind in ACTIVATIONS if "inplace" in signature(kind).parameters]
)
def test_activations_in_place_give_their_input_changed(kind: type[nn.Module]) -> None:
    x = IMAGES.to("meta", copy=True)
    version = x._version
    assert given(kind(inplace=True), x) is x
    assert x._version > version


@pytest.mark.parametrize("case", INPUTS)
def test_layer_norms_give_what_torch_gives(case: str) -> None:
    x = INPUTS[case]
    norm = nn.LayerNorm(x.shape[-1], dtype=x.dtype)
    assert_alike(given(copy.deepcopy(norm).to("meta"), x.to("meta")), norm(x))


def test_layer_norms_that_do_not_fit_fail_as_they_do() -> None:
    with pytest.raises(RuntimeError, match="normalized_shape"):
        given(nn.LayerNorm([5, 7], device="meta"), IMAGES.to("meta"))


class Operations(TorchDispatchMode):
    """Notes which operations are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "module",
    [*(kind() for kind in ACTIVATIONS), nn.BatchNorm2d(4), nn.LayerNorm(6)],
    ids=lambda module: type(module).__name__,
)
def test_activations_and_norms_are_not_computed(module: nn.Module) -> None:
    module, x = module.to("meta").eval(), IMAGES.to("meta")
    with Operations() as computed:
        given(module, x)
    assert computed.names == {"empty_like"}
