"""Fused programs compute what unfused ones do, from the weights as they are now."""

import copy
from collections.abc import Callable

import pytest
import small
import torch
import torch.nn.functional as F
from fusing import EXECUTIONS, Ensemble, assert_fused_equals, fused_modules, run, settle
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.engine.plan import Plan
from treeify.fusion import AddInto, FusedConv, Overwrite, packed_module

WIDTH = 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, two stages given as modules or built by hand, and a head; [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self, stage1: nn.Module, stage2: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))
        self.stage1 = stage1
        self.stage2 = nn.Conv2d(WIDTH, WIDTH, 1) if stage2 is None else stage2
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(x.flatten(2).mean(2))


def convert(model: nn.Module, splits: list[str] | None = None) -> Ensemble:
    hne = treeify.hierarchicalize(
        model, splits or ["stage1", "stage2"], init="perturb", example_input=small.EXAMPLE
    ).eval()
    torch.manual_seed(3)
    settle(hne)
    return hne


def ensemble() -> Ensemble:
    hne = small.ensemble()
    torch.manual_seed(3)
    settle(hne)
    return hne


def conv(**kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, **{"padding": 1, **kwargs})  # type: ignore[arg-type]


ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU, nn.Identity),
    nn.Sigmoid,  # cannot overwrite its input
)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_norms_and_activations_are_part_of_the_convolution(
    activation: Callable[[], nn.Module] | None,
) -> None:
    after = [activation()] if activation else []
    stages = [nn.Sequential(conv(bias=bias), nn.BatchNorm2d(WIDTH), *after) for bias in (0, 1)]
    hne = convert(Net(*stages))
    assert len(fused_modules(hne, FusedConv)) == 3
    assert all(module.operations[1] is not None for module in fused_modules(hne, FusedConv))
    assert_fused_equals(hne)


def test_approximate_gelu_and_sloped_activations_keep_their_options() -> None:
    stages = [
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), activation)
        for activation in (nn.GELU("tanh"), nn.LeakyReLU(0.7))
    ]
    assert_fused_equals(convert(Net(*stages)))


@pytest.mark.parametrize(
    "stage",
    [
        conv(groups=4),
        conv(groups=WIDTH),
        nn.Sequential(conv(groups=2), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        nn.Sequential(conv(groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.SiLU()),
        conv(stride=2),
        conv(dilation=2, padding=(1, 2)),
        conv(padding="same"),
        conv(padding="same", dilation=2),
        conv(padding="valid"),
        conv(padding_mode="reflect"),
        nn.Sequential(conv(padding_mode="circular"), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        nn.Sequential(Conv2dSame(WIDTH, WIDTH, 3, stride=2), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        nn.Sequential(Conv2dSame(WIDTH, WIDTH, 3, stride=2, groups=4), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, act_layer=nn.SiLU)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, act_layer=nn.PReLU)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, apply_act=False), nn.ReLU()),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, drop_layer=nn.Dropout), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH, affine=False), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH, track_running_stats=False), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH, eps=0.5), nn.ReLU(), nn.Hardswish()),
        nn.Sequential(nn.ReLU(), conv(), nn.ReLU(inplace=True), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(WIDTH, WIDTH, 3), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        nn.Sequential(
            nn.Unflatten(1, (WIDTH, 1)),
            nn.Conv3d(WIDTH, WIDTH, 3, padding=1),
            nn.BatchNorm3d(WIDTH),
            nn.Flatten(1, 2),
        ),
    ],
    ids=repr,
)
def test_layers_right_after_a_split(stage: nn.Module) -> None:
    if isinstance(stage, nn.Sequential) and isinstance(stage[0], nn.Flatten):
        assert_fused_equals(convert(Net(stage, nn.Conv1d(WIDTH, WIDTH, 1))))
    else:
        assert_fused_equals(convert(Net(stage, copy.deepcopy(stage))))


class Residual(nn.Module):
    """Two convolutions and a way to join them with their input."""

    def __init__(self, join: Callable[["Residual", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.other_norm = nn.BatchNorm2d(WIDTH)
        self.dropout = nn.Dropout()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def _twice(own: Residual, x: Tensor) -> Tensor:
    y = own.conv1(x)
    return y + y


def _in_place_on_both(own: Residual, x: Tensor) -> Tensor:
    y = own.conv1(x)
    y += x
    z = own.conv2(y)
    z.add_(y)
    return F.relu(z, inplace=True)


def _read_twice(own: Residual, x: Tensor) -> Tensor:
    y = own.conv1(x)
    return F.relu(y) + own.norm(y)


def _view_read(own: Residual, x: Tensor) -> Tensor:
    y = own.norm(own.conv1(x))
    left, right = y.chunk(2, 1)
    return torch.cat((F.relu(left) + right, right), 1)


def _attention(own: Residual, x: Tensor) -> Tensor:
    y = own.norm(own.conv1(x))
    gate = own.conv2(y.mean((2, 3), keepdim=True))
    return F.relu(y * gate.sigmoid() + x)


JOINS: dict[str, Callable[[Residual, Tensor], Tensor]] = {
    "conv + x": lambda own, x: own.norm(own.conv1(x)) + x,
    "x + conv": lambda own, x: x + own.norm(own.conv1(x)),
    "relu(conv + x)": lambda own, x: F.relu(own.norm(own.conv1(x)) + x),
    "conv + conv": lambda own, x: F.relu(own.norm(own.conv1(x)) + own.conv2(x)),
    "relu(conv) + conv": lambda own, x: F.relu(own.conv1(x)) + own.conv2(x),
    "relu(conv) + relu(conv)": lambda own, x: F.relu(own.conv1(x)) + F.relu(own.conv2(x)),
    "conv + conv + x": lambda own, x: (own.conv1(x) + own.norm(own.conv2(x)) + x).relu(),
    "chain": lambda own, x: own.conv2(own.conv1(x) + x) + own.conv1(x),
    "torch.add": lambda own, x: torch.add(own.conv1(x), x),
    "torch.add alpha": lambda own, x: torch.add(own.conv1(x), x, alpha=2),
    "method add": lambda own, x: own.conv1(x).add(x).relu(),
    "method add alpha": lambda own, x: own.conv1(x).add(x, alpha=0.5).relu(),
    "subtraction": lambda own, x: F.relu(own.conv1(x) - x),
    "product": lambda own, x: F.silu(own.conv1(x) * x),
    "y + y": _twice,
    "in place": _in_place_on_both,
    "read twice": _read_twice,
    "views": _view_read,
    "attention": _attention,
    "number": lambda own, x: own.conv1(x) + 2,
    "number from the right": lambda own, x: 2 + own.conv1(x),
    "size": lambda own, x: own.conv1(x) + x.shape[1],
    "size from the right": lambda own, x: x.size(2) + own.conv1(x),
    "scalar parameter": lambda own, x: own.conv1(x) + own.scale,
    "scaled": lambda own, x: own.conv1(x) * own.scale + x,
    "broadcast": lambda own, x: own.conv1(x) + x.mean((2, 3), keepdim=True),
    "broadcast onto conv": lambda own, x: own.conv1(x.mean((2, 3), keepdim=True)) + x,
    "one norm, two convolutions": lambda own, x: own.norm(own.conv2(own.norm(own.conv1(x)))),
    "one convolution, two norms": lambda own, x: own.other_norm(own.conv1(own.norm(own.conv1(x)))),
    "norms of one output": lambda own, x: _norms(own, own.conv1(x)),
    "double": lambda own, x: (own.conv1(x).double() + x.double()).float(),
    "never read": lambda own, x: _dropped(own, own.conv1(x)),
    "activation twice": lambda own, x: F.gelu(F.hardswish(F.relu6(own.conv1(x)))),
}


def _norms(own: Residual, y: Tensor) -> Tensor:
    return own.norm(y) + own.other_norm(y)


def _dropped(own: Residual, y: Tensor) -> Tensor:
    gate = y.sigmoid()
    own.dropout(gate * gate.tanh() + gate)
    return y


@pytest.mark.parametrize("join", JOINS)
def test_sums_and_values_read_twice(join: str) -> None:
    assert_fused_equals(convert(Net(Residual(JOINS[join]), Residual(JOINS[join])), ["stage2:3"]))


def test_sums_and_activations_are_fused() -> None:
    join = JOINS["relu(conv + x)"]
    hne = convert(Net(Residual(join), Residual(join)))
    assert len(fused_modules(hne, FusedConv)) == 3
    assert not fused_modules(hne, AddInto)
    assert not fused_modules(hne, Overwrite)
    targets = [node.target for s in hne._fused.program.segments for node in s.module.graph.nodes]
    assert F.relu not in targets


def test_values_that_cross_levels_stay_as_they_were() -> None:
    class Skips(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem[0](x)  # unnormed: read by all levels
            first = self.stage1[0](self.stem[1](stem).relu())
            second = self.stage2[0](first.relu()) + first
            return self.head((second.relu() + first + stem).mean((2, 3)))

    hne = convert(Skips(), ["stage1", "stage2:3"])
    assert_fused_equals(hne)
    x = small.images()
    hne.tunings.update(_fused_tuning(hne, x))
    whole = run(hne, x, fuse=False)
    session = hne.session(x)
    for size in range(1, hne.leaves + 1):
        held = {
            (level, name): (value.value, value.value.clone())
            for level, values in session._kept.items()
            for name, value in values.items()
        }
        session.advance(to=size)
        assert all(torch.equal(now, before) for now, before in held.values())
        assert_close(session.leaf_logits, whole[:, :size], rtol=1e-4, atol=1e-5)
    assert hne._program(hne.plan(x)) is hne._programs[False]  # with gradients
    with torch.no_grad():
        assert hne._program(hne.plan(x)) is hne._fused.program


def _fused_tuning(hne: Ensemble, x: Tensor) -> dict:
    situation = treeify.engine.plan.Situation.of(x, training=False)
    plan = Plan(("packed",) * hne.tree.levels, None, fuse=True)
    return {situation: treeify.engine.plan.Tuning(situation, plan)}


def _step(hne: Ensemble) -> None:
    optimizer = torch.optim.SGD(hne.parameters(), lr=0.5)
    hne(small.images()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _adam_step(hne: Ensemble) -> None:
    optimizer = torch.optim.AdamW(hne.parameters(), lr=0.1, foreach=True)
    hne(small.images()).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def _copy(hne: Ensemble) -> None:
    for tensor in (*hne.parameters(), *hne.buffers()):
        tensor.copy_(tensor * 1.5)


@torch.inference_mode()
def _copy_in_inference_mode(hne: Ensemble) -> None:
    hne.load_state_dict(small.ensemble(seed=5).state_dict())


def _replace(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach() * 2)


def _assign_data(hne: Ensemble) -> None:
    for parameter in hne.parameters():
        parameter.data = parameter.data * 1.5


def _train(hne: Ensemble) -> None:
    hne.train()
    with torch.no_grad():
        hne(3 * small.images(4, seed=8) + 1)
    hne.eval()


def _train_looped(hne: Ensemble) -> None:
    hne.execution = "looped"
    _train(hne)


def _train_without_counters(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    _train(hne)


def _train_one_norm(hne: Ensemble) -> None:
    """A batch norm that learns statistics inside an ensemble that stays in evaluation mode."""
    norm = hne.get_submodule("stage1.1").train()
    run(hne, 2 * small.images(4, seed=8), fuse=True)
    norm.eval()


def _train_one_norm_without_a_counter(hne: Ensemble) -> None:
    hne.get_submodule("stage1.1").num_batches_tracked = None
    _train_one_norm(hne)


def _reset(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def _other_eps(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


def _tune_training(hne: Ensemble) -> None:
    _train(hne)
    hne.tune(small.images(), training=True, repeats=1)


CHANGES = [
    *(_step, _adam_step, _copy, _copy_in_inference_mode, _replace, _assign_data, _train),
    *(
        _train_looped,
        _train_without_counters,
        _train_one_norm,
        _reset,
        _train_one_norm_without_a_counter,
        _other_eps,
    ),
    _tune_training,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_folded_weights_follow_the_weights(change: Callable[[Ensemble], None]) -> None:
    hne, x = ensemble(), small.images()
    before = {
        way: [run(hne, x, fuse=True, way=way, leaves=leaves) for leaves in (6, 4)]
        for way in EXECUTIONS
    }
    change(hne)
    assert not hne.training
    for way in EXECUTIONS:
        for old in before[way]:
            leaves = old.shape[1]
            found = run(hne, x, fuse=True, way=way, leaves=leaves)
            expected = run(hne, x, fuse=False, leaves=leaves)
            assert not torch.allclose(found, old, rtol=1e-3)
            assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_folded_weights_follow_dtype_and_memory_format() -> None:
    hne, x = ensemble(), small.images()
    assert_fused_equals(hne, x)
    hne.to(memory_format=torch.channels_last)
    assert_fused_equals(hne, x)
    hne.to(torch.float64)
    assert_close(run(hne, x.double(), fuse=True), run(hne, x.double(), fuse=False))
    hne.to(torch.bfloat16)
    halves = [run(hne, x.bfloat16(), fuse=fuse) for fuse in (True, False)]
    assert_close(*halves, rtol=0.05, atol=0.05)
    hne.float()
    assert_fused_equals(hne, x)


def test_copies_fold_their_own_weights() -> None:
    hne, x = ensemble(), small.images()
    before = run(hne, x, fuse=True)
    twin = copy.deepcopy(hne)
    assert_close(run(twin, x, fuse=True), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert run(twin, x, fuse=True).abs().max() == 0
    assert_close(run(hne, x, fuse=True), before, rtol=0, atol=0)
    convolutions = {
        id(packed_module(module.operations[0])) for module in fused_modules(twin, FusedConv)
    }
    assert convolutions <= {id(module) for module in twin.modules()}


def test_a_copied_gelu_still_runs() -> None:
    hne = convert(Net(nn.Sequential(conv(), nn.GELU("tanh")), nn.Sequential(conv(), nn.ReLU6())))
    assert_fused_equals(copy.deepcopy(hne))


def test_a_norm_in_training_mode_uses_the_batch() -> None:
    hne = convert(Net(Residual(JOINS["relu(conv + x)"])))
    twins = [hne, copy.deepcopy(hne)]
    x = small.images(4)
    found = []
    for twin, fuse in zip(twins, (True, False), strict=True):
        run(twin, x, fuse=fuse)
        twin.get_submodule("stage1.norm").train()
        found.append(run(twin, x, fuse=fuse, way="looped"))
        found.append(run(twin, x, fuse=fuse))
    assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-5)
    buffers = zip(twins[0].buffers(), twins[1].buffers(), strict=True)
    assert all(torch.allclose(one, other) for one, other in buffers)


def test_a_norm_with_its_activation_in_training_mode_uses_the_batch() -> None:
    hne = convert(Net(nn.Sequential(conv(), BatchNormAct2d(WIDTH)), conv()))
    hne.get_submodule("stage1.1").train()
    x = small.images(4)
    assert_close(run(hne, x, fuse=True), run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)


def test_with_gradients_nothing_is_fused() -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    gradients = []
    for fuse in (True, False):
        hne.zero_grad()
        logits = hne.run(x, hne.leaves, Plan(("packed",) * 3, None, fuse))
        assert logits.requires_grad
        logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in hne.parameters()])
    assert_close(gradients[0], gradients[1])


def test_in_training_mode_nothing_is_fused() -> None:
    hne, x = ensemble(), small.images()
    hne.train()
    means = hne.get_submodule("stem.1").running_mean.clone()
    run(hne, x, fuse=True)
    assert not torch.equal(hne.get_submodule("stem.1").running_mean, means)


@pytest.mark.parametrize("way", EXECUTIONS)
def test_inference_mode(way: str) -> None:
    hne, x = ensemble(), small.images()
    expected = run(hne, x, fuse=False)
    with torch.inference_mode():
        inside = hne.run(x, 6, Plan((way,) * 3, None, fuse=True))
    assert_close(inside, expected, rtol=1e-4, atol=1e-5)
    # What inference mode folded serves calls outside of it, and follows the weights.
    assert_close(run(hne, x, fuse=True, way=way), expected, rtol=1e-4, atol=1e-5)
    _copy(hne)
    assert_close(run(hne, x, fuse=True, way=way), run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", ["all", "norm", "conv"])
def test_tensors_made_in_inference_mode(changed: str) -> None:
    hne, x = ensemble(), small.images()
    with torch.inference_mode():
        for module in hne.modules():
            kinds = {"all": nn.Module, "norm": nn.BatchNorm2d, "conv": nn.Conv2d}
            if isinstance(module, kinds[changed]):
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            own = isinstance(tensor, nn.Parameter)
                            new = tensor.clone()
                            table[name] = nn.Parameter(new, requires_grad=False) if own else new
    assert_fused_equals(hne, x)
    with torch.inference_mode():
        for tensor in (*hne.parameters(), *hne.buffers()):
            tensor.mul_(2)
    assert_fused_equals(hne, x)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # a flag that is set along with the other
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_dtypes_and_memory_formats(count: int, dtype: torch.dtype, onednn: bool) -> None:
    stages = [nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.ReLU()), nn.Conv2d(WIDTH, WIDTH, 1)]
    hne, x = convert(Net(*stages)).to(dtype), small.images(count).to(dtype)
    for way in EXECUTIONS:
        expected = torch.cat([hne.leaf(n)(x)[:, None].detach() for n in range(4)], dim=1)
        for channels_last in (None, True, False):
            with torch.backends.mkldnn.flags(enabled=onednn):
                found = run(hne, x, fuse=True, way=way, channels_last=channels_last)
            assert found.dtype == dtype
            assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_of_any_layout_and_size() -> None:
    hne, x = ensemble(), small.images(4)
    wide = torch.cat((x, x), dim=1)
    inputs = [
        x.to(memory_format=torch.channels_last),
        x[:1].expand(4, -1, -1, -1),
        wide[:, ::2],
        wide[:, 2:5],
        x.transpose(2, 3),
        x[::2],
        torch.randn(2, 3, 5, 7),
        torch.randn(3, 3, 16, 16),
    ]
    for image in inputs:
        assert_fused_equals(hne, image)


def test_prepared_weights_do_not_pile_up() -> None:
    hne = ensemble()
    for count in range(1, 12):
        for leaves in range(1, 7):
            run(hne, small.images(count), fuse=True, leaves=leaves)
    for module in fused_modules(hne, FusedConv):
        cached = sum(weight.numel() for weight, _ in module._cache.values())
        assert cached <= 4 * packed_module(module.operations[0]).weight.numel()


def test_mixed_precision() -> None:
    hne, x = ensemble(), small.images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(hne, x, fuse=True)
    assert_close(found.float(), run(hne, x, fuse=False), rtol=0.05, atol=0.05)


def test_hooks_on_modules_are_called() -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    calls: list[str] = []
    handle = hne.get_submodule("stage1.1").register_forward_hook(lambda *_: calls.append("norm"))
    twin = copy.deepcopy(hne)
    run(hne, x, fuse=True)
    run(twin, x, fuse=True)
    assert calls == ["norm"] * 2
    handle.remove()
    run(hne, x, fuse=True)
    assert calls == ["norm"] * 2


def test_parametrized_weights_are_followed() -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    torch.nn.utils.parametrizations.weight_norm(hne.get_submodule("stem.0"))
    with torch.no_grad():
        hne.get_submodule("stem.0").parametrizations.weight.original0.mul_(2)
    assert_fused_equals(hne, x)


def test_functional_calls_use_the_given_weights() -> None:
    hne, x = ensemble(), small.images()
    hne.tunings.update(_fused_tuning(hne, x))
    other = {name: 1.5 * tensor.detach() for name, tensor in hne.named_parameters()}
    with torch.no_grad():
        before = hne(x)
        found = torch.func.functional_call(hne, other, (x,))
        assert torch.equal(hne(x), before)
        hne.load_state_dict(other, strict=False)
        assert_close(found, run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)


def test_fusing_leaves_the_other_programs_alone() -> None:
    hne, x = ensemble(), small.images()
    graphs = [str(segment.module.graph) for segment in hne._programs[False].segments]
    before = hne(x)
    run(hne, x, fuse=True)
    assert graphs == [str(segment.module.graph) for segment in hne._programs[False].segments]
    assert torch.equal(hne(x), before)
    assert "FusedConv" not in {type(module).__name__ for module in hne.modules()}
