"""Fused linear layers compute what plain ones do, from the weights as they are now."""

import copy
from collections.abc import Callable

import pytest
import small
import torch
from fusing import (
    EXECUTIONS,
    Ensemble,
    assert_fused_equals,
    assign_data,
    fused_modules,
    run,
    settle,
    step,
)
from timm.layers import DropPath
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.engine.plan import Plan
from treeify.fusion import AddInto, FusedLinear, Overwrite

WIDTH = 8
BLOCKS = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _all_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers here are far smaller than those that oneDNN is used for."""
    monkeypatch.setattr("treeify.fusion.linear.SMALL", 0)


class Block(nn.Module):
    """A residual block of a token model, `[N, T, C] -> [N, T, C]`."""

    def __init__(self, activation: nn.Module, layer: type[nn.Linear], *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = layer(WIDTH, 2 * WIDTH, bias=bias)
        self.activation, self.drop = activation, nn.Dropout(0.5)
        self.fc2, self.scale = layer(2 * WIDTH, WIDTH, bias=bias), nn.Identity()
        self.path = DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.activation(self.fc1(self.norm(x))))
        return x + self.path(self.scale(self.fc2(y)))


class Tokens(nn.Module):
    """Patches, three blocks and a head; [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.blocks = nn.ModuleList(block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def convert(block: Callable[[], nn.Module]) -> Ensemble:
    hne = treeify.hierarchicalize(
        Tokens(block), ["blocks.1", "blocks.2"], init="perturb", example_input=small.EXAMPLE
    ).eval()
    torch.manual_seed(3)
    settle(hne)
    return hne


def ensemble(
    activation: Callable[[], nn.Module] = nn.GELU,
    layer: type[nn.Linear] = nn.Linear,
    *,
    bias: bool = True,
) -> Ensemble:
    return convert(lambda: Block(activation(), layer, bias=bias))


def prepared(hne: Ensemble) -> int:
    """How many prepared weights there are."""
    return sum(len(module._cache) for module in fused_modules(hne, FusedLinear))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear, TimmLinear])
def test_layers(layer: type[nn.Linear], bias: bool) -> None:
    hne = ensemble(layer=layer, bias=bias)
    assert_fused_equals(hne)
    assert len(fused_modules(hne, FusedLinear)) == 2 * BLOCKS + 1
    # Levels of 1, 2 and 4 branches; the last has the head, whose rows are fewer.
    assert prepared(hne) == 2 + 2 * 2 + 3 * 4


ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Hardswish),
    *(lambda: nn.LeakyReLU(0.7), nn.Identity),
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_part_of_the_layer(activation: Callable[[], nn.Module]) -> None:
    hne = ensemble(activation)
    assert_fused_equals(hne)
    assert not fused_modules(hne, Overwrite)
    first = [module.activation is not None for module in fused_modules(hne, FusedLinear)]
    assert sum(first) == (0 if activation is nn.Identity else BLOCKS)


def test_an_activation_that_cannot_overwrite_its_input_stays() -> None:
    hne = ensemble(nn.Sigmoid)
    assert_fused_equals(hne)
    assert all(module.activation is None for module in fused_modules(hne, FusedLinear))


def test_levels_of_both_kinds() -> None:
    hne, x = ensemble(), small.images(3)
    expected = run(hne, x, fuse=False)
    for executions in (("packed", "looped", "packed"), ("looped", "packed", "looped")):
        with torch.no_grad():
            logits = hne.run(x, hne.leaves, Plan(executions, None, fuse=True))
        assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_sums_are_written_over_what_they_alone_read() -> None:
    hne = ensemble()
    assert_fused_equals(hne)
    assert len(fused_modules(hne, AddInto)) == BLOCKS
    targets = {
        str(node.target)
        for segment in hne._fused.program.segments
        for node in segment.module.graph.nodes
    }
    assert not any(word in name for name in targets for word in ("drop", "scale", "path"))


class ReadTwice(nn.Module):
    """The outputs of its layers are read more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.skip, self.drop = nn.Identity(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        z = self.skip(y)
        both = nn.functional.gelu(y) * z + self.drop(x)
        w = self.fc2(both)
        return self.drop(w) + (w + both)


def test_values_read_twice_are_not_overwritten() -> None:
    hne = convert(ReadTwice)
    assert_fused_equals(hne)
    # The sums with a product and with the inner sum of the last line.
    assert all(module.activation is None for module in fused_modules(hne, FusedLinear))


@torch.no_grad()
def _in_place(hne: Ensemble) -> None:
    for parameter in hne.parameters():
        parameter.copy_(parameter * 1.5)


@torch.inference_mode()
def _load(hne: Ensemble) -> None:
    hne.load_state_dict({name: 1.5 * tensor for name, tensor in hne.state_dict().items()})


def _replace(hne: Ensemble) -> None:
    for _, module in hne.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach() * 1.5)


def _write_data(hne: Ensemble) -> None:
    for parameter in hne.parameters():
        parameter.data.mul_(1.5)  # leaves no trace
    hne.train().eval()


CHANGES = (_in_place, step, _load, _replace, assign_data, _write_data)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_prepared_weights_follow_the_weights(change: Callable[[Ensemble], None]) -> None:
    hne, x = ensemble(), small.images()
    before = {execution: run(hne, x, fuse=True, execution=execution) for execution in EXECUTIONS}
    assert prepared(hne)
    change(hne)
    for execution in EXECUTIONS:
        logits = run(hne, x, fuse=True, execution=execution)
        assert not torch.allclose(logits, before[execution], rtol=1e-3)
        assert_close(logits, run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)


def test_copies_prepare_their_own_weights() -> None:
    hne, x = ensemble(), small.images()
    before = run(hne, x, fuse=True, execution="looped")
    twin = copy.deepcopy(hne)
    assert prepared(twin) == 0
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    assert run(twin, x, fuse=True, execution="looped").abs().max() == 0
    assert_close(run(hne, x, fuse=True, execution="looped"), before, rtol=0, atol=0)


def test_prepared_weights_do_not_pile_up() -> None:
    hne = ensemble()
    for count in range(1, 12):
        run(hne, small.images(count), fuse=True, execution="looped")
    for module in fused_modules(hne, FusedLinear):
        cached = sum(weight.numel() for weight, _ in module._cache.values())
        assert 0 < cached <= 4 * module._module[0].weight.numel()


def test_packed_levels_keep_no_copies() -> None:
    hne = ensemble()
    run(hne, small.images(), fuse=True, execution="packed")
    assert prepared(hne) == 2  # of level 0, which has one branch


def test_small_products_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.fusion.linear.SMALL", 2 * 4 * WIDTH * 2 * WIDTH + 1)
    hne = ensemble()
    run(hne, small.images(2), fuse=True, execution="looped")
    assert prepared(hne) == 0
    run(hne, small.images(3), fuse=True, execution="looped")
    assert prepared(hne) > 0


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_plainly(dtype: torch.dtype, count: int) -> None:
    hne, x = ensemble().to(dtype), small.images(count).to(dtype)
    for execution in EXECUTIONS:
        logits = run(hne, x, fuse=True, execution=execution)
        exact = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
        assert_close(logits, run(hne, x, fuse=False), **exact)
    assert prepared(hne) == 0


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # a flag that is set along with the other
def test_without_onednn() -> None:
    hne = ensemble()
    with torch.backends.mkldnn.flags(enabled=False):
        assert_fused_equals(hne)
    assert prepared(hne) == 0


def test_other_devices_run_plainly() -> None:
    hne = ensemble().to("meta")
    logits = run(hne, small.images().to("meta"), fuse=True, execution="looped")
    assert logits.device.type == "meta"
    assert prepared(hne) == 0


def test_mixed_precision_is_respected() -> None:
    hne, x = ensemble(), small.images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run(hne, x, fuse=True, execution="looped")
    assert logits.dtype == torch.bfloat16
    assert prepared(hne) == 0
    assert_close(logits.float(), run(hne, x, fuse=False), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["blocks.0.fc1", "blocks.1.drop", "blocks.0.scale"])
def test_hooks_on_modules_are_called(name: str) -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    calls: list[str] = []
    handle = hne.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    run(hne, x, fuse=True)
    assert calls == [name]
    handle.remove()
    run(hne, x, fuse=True)
    assert calls == [name]


@pytest.mark.parametrize("name", ["blocks.0.drop", "blocks.1.drop", "blocks.2.path"])
def test_a_dropout_in_training_mode_drops(name: str) -> None:
    hne, x = ensemble(), small.images(4)
    still = run(hne, x, fuse=True)
    hne.get_submodule(name).train()
    logits = []
    for fuse in (True, False):
        torch.manual_seed(1)
        logits.append(run(hne, x, fuse=fuse))
    assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], still, rtol=1e-3)
    hne.eval()
    assert_close(run(hne, x, fuse=True), still, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["blocks.0.fc1", "blocks.1.fc1"])
@pytest.mark.parametrize("run_before", [True, False])
def test_parametrized_weights_are_followed(name: str, run_before: bool) -> None:
    hne, x = ensemble(), small.images()
    if run_before:
        run(hne, x, fuse=True, execution="looped")
    layer = hne.get_submodule(name)
    torch.nn.utils.parametrizations.weight_norm(layer)
    assert_fused_equals(hne)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    assert_fused_equals(hne)
    assert_close(run(hne, x, fuse=True), run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)
