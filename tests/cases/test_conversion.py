"""What users of other projects ran into when they converted odd models."""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small
import timm
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

import treeify
from treeify.conversion.assemble import trace_model
from treeify.conversion.splits import split_points
from treeify.errors import CheckpointError, InputError, ModelError, SplitError, TraceError
from treeify.models.architecture import Architecture

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(*middle: nn.Module) -> nn.Sequential:
    """`[N, 3, H, W] -> [N, 5]`, the middle after two convolutions of 8 channels."""
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), *middle, *head).eval()


def copied(model: nn.Module, splits: Any = ("1",), x: Tensor = X) -> treeify.HierarchicalEnsemble:
    """An ensemble whose leaves are to be the model, verified."""
    hne = treeify.hierarchicalize(model, splits, init="copy", example_input=x).eval()
    assert treeify.verify(hne, x).worst <= 1
    return hne


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "layer norm": lambda: nn.LayerNorm(12),
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "max pool": lambda: nn.MaxPool2d(2),
    "dropout": nn.Dropout,
    "convolution": lambda: nn.Conv2d(8, 8, 1),
    "prelu": nn.PReLU,
}


@pytest.mark.parametrize("splits", [("1",), ("2",)], ids=["inside", "at"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_probe_attached_to_a_layer_takes_no_part(name: str, splits: tuple[str, ...]) -> None:
    layer = LAYERS[name]()
    if splits == ("2",) and not any(True for _ in layer.parameters()):
        splits = ("2:3",)
    layer.probe = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = network(layer)
    hne = copied(model, splits)
    assert_close(hne(X)[:, 1], model(X))
    assert hne.leaf(1).state_dict().keys() == model.state_dict().keys()
    assert any("take no part" in note and "2.probe" in note for note in hne.conversion.notes)


def test_a_branch_that_the_model_calls_itself_is_no_probe() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.conv.adapter = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + self.conv.adapter(x)).mean((2, 3))

    assert copied(Adapted(), ["conv"]).conversion.notes == ()


class Keeping(nn.Module):
    """Keeps its last activation, bare or in a list or a dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
        self.kind, self.last, self.features = kind, None, {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "dict":
            self.features["a"] = x
        else:
            self.last = [x] if self.kind == "list" else x
        return self.b(x).mean((2, 3))


@pytest.mark.parametrize("kind", ["tensor", "list", "dict"])
@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_a_model_that_keeps_its_last_activation_converts_after_use(kind: str, init: str) -> None:
    models = [Keeping(kind) for _ in range(4)]
    models[1](X).sum().backward()
    torch.no_grad()(models[2])(X)
    torch.inference_mode()(models[3])(X)
    ensembles = [
        treeify.hierarchicalize(model, ["b"], init=init, example_input=X) for model in models
    ]
    for hne in ensembles:
        assert_close(hne(X), ensembles[0](X))
        assert hne.conversion.notes == ensembles[0].conversion.notes


def test_a_mean_that_one_call_leaves_for_the_next_is_still_refused() -> None:
    class Mean(Keeping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return self.b(x - self.mean).mean((2, 3))

    model = Mean("tensor")
    model.mean = torch.zeros(())
    with pytest.raises(TraceError, match="changes its attribute 'mean'"):
        treeify.hierarchicalize(model, ["b"], init="fresh", example_input=X)


def test_a_model_compiled_in_place_converts() -> None:
    model = small.SmallNet().eval()
    plain = copied(model, ["stage1"], small.images())
    model.compile(backend="eager")
    model.stage2.compile(backend="eager")
    hne = copied(model, ["stage1"], small.images())
    assert_close(hne(small.images()), plain(small.images()))
    assert model._compiled_call_impl is not None
    treeify.pack([model, small.SmallNet()], ["stage1"], example_input=small.EXAMPLE)


def test_compiled_parts_are_traced_into() -> None:
    model = small.SmallNet()
    model.stage1 = torch.compile(model.stage1, backend="eager")
    hne = treeify.hierarchicalize(model, ["stage1"], init="copy", example_input=small.EXAMPLE)
    assert hne.conversion.packed_fraction == 1


def _change_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.clamp_(max=0)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, i, o: o.clamp(max=0)),
    "of the input": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "with keywords": lambda m: m.register_forward_hook(
        lambda m, i, k, o: 2 * o, with_kwargs=True, always_call=True
    ),
    "input with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, i, k: ((i[0] * 2,), k), with_kwargs=True
    ),
    "in place": lambda m: m.register_forward_hook(_change_in_place),
    "in training": lambda m: m.register_forward_hook(lambda m, i, o: o + m.training),
}


@pytest.mark.parametrize("place", ["0", "2", "3", "3.1"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_what_is_computed_stay(name: str, place: str) -> None:
    model = network(nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.LeakyReLU()))
    HOOKS[name](model.get_submodule(place))
    hne = copied(model)
    for mode in (False, True):
        assert_close(hne.train(mode)(X)[:, 1], model.train(mode)(X))
    kind = type(model.get_submodule(place)).__name__
    assert hne.conversion.notes[-1].startswith(f"{place} ({kind}) runs as one call, since its hook")
    assert len(model.get_submodule(place)._forward_hooks) <= 1


def test_a_saved_ensemble_is_loaded_with_the_hooks_that_it_had(tmp_path: Path) -> None:
    model = network()
    model[1].register_forward_hook(lambda m, i, o: 2 * o)
    hne = copied(model)
    treeify.save(hne, tmp_path / "saved")
    assert_close(treeify.load(tmp_path / "saved", model=model)(X), hne.eval()(X))
    with pytest.raises(CheckpointError, match=r"such hooks around 1(?s:.)*around none"):
        treeify.load(tmp_path / "saved", model=network())


def test_hooks_that_change_gradients_stay() -> None:
    model = network(nn.ReLU())
    model[1].register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 3,))
    hne = copied(model)
    model(X).square().sum().backward()
    hne(X)[:, 1].square().sum().backward()
    weight = hne.get_parameter("0.weight").grad
    assert weight is not None
    assert_close(weight, model[0].weight.grad)


class Doubler:
    """Holds what no copy could be made of."""

    def __init__(self) -> None:
        self.file = open("/dev/null")  # noqa: PTH123, SIM115

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return 2 * output


def test_what_holds_a_hook_is_not_copied() -> None:
    model, doubler = network(), Doubler()
    with doubler.file:
        model[1].register_forward_hook(doubler)
        assert_close(copied(model)(X)[:, 0], model(X))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
def test_eager_quantisation_aware_training_goes_on() -> None:
    model = network(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())).train()
    model.qconfig = quantization.QConfig(
        activation=quantization.default_fake_quant, weight=quantization.default_weight_fake_quant
    )
    quantization.prepare_qat(model, inplace=True)
    model(X)
    hne = treeify.hierarchicalize(model.eval(), ["2"], init="copy", example_input=X)
    assert_close(hne(X)[:, 1], model(X))


def test_hooks_that_observe_are_left_out_and_draw_no_numbers() -> None:
    model, seen = network(nn.ReLU()), []
    model[2].register_forward_hook(lambda m, i, o: seen.append(random.random()))
    model[2].register_forward_hook(lambda m, i, o: o)
    state = random.getstate()
    hne = copied(model)
    assert random.getstate() == state
    calls = len(seen)
    hne(X)
    hne.leaf(0)(X)
    assert len(seen) == calls
    assert hne.conversion.notes == ("leaves out the hooks of 2",)
    assert hne.conversion.packed_fraction == 1


def test_hooks_that_no_branch_could_have_are_refused() -> None:
    model = network()
    handle = model.register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(TraceError, match="of the model itself"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: 2 * o)
    try:
        with pytest.raises(TraceError, match="of all modules"):
            treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)
    finally:
        handle.remove()
    parallel = nn.DataParallel(model)
    parallel.register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(ModelError, match="hooks around DataParallel"):
        treeify.hierarchicalize(parallel, ["1"], init="fresh", example_input=X)
    model[1].register_forward_hook(lambda m, i, o: o.missing)
    with pytest.raises(TraceError, match=r"the hook .* of 1 does not run on the example"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)


def test_packed_models_have_the_same_hooks() -> None:
    models = [network(), network()]
    models[1][1].register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(ModelError, match="model 1 has other hooks"):
        treeify.pack(models, ["1"], example_input=X)


def test_an_ensemble_with_hooks_is_not_saved_under_a_librarys_name() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    model.layer4.register_forward_hook(lambda m, i, o: o.clamp(max=1))
    hne = treeify.hierarchicalize(
        model, ["layer3"], init="fresh", example_input=torch.zeros(1, 3, 32, 32)
    )
    assert hne.architecture is None


@pytest.mark.parametrize("init", ["fresh", "perturb", "copy"])
@pytest.mark.parametrize("named", [False, True])
def test_frozen_parameters_keep_the_models_values(init: str, named: bool) -> None:
    model = timm.create_model("resnet10t", num_classes=3) if named else small.SmallNet()
    frozen, splits = ("layer3", "layer2") if named else ("stem", "stem")
    model.get_submodule(frozen).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.5)
    example = torch.zeros(1, 3, 32, 32) if named else small.EXAMPLE
    hne = treeify.hierarchicalize(model, [splits], init=init, example_input=example)
    for leaf in map(hne.leaf, range(hne.leaves)):
        for key, tensor in leaf.get_submodule(frozen).state_dict().items():
            assert_close(tensor, model.get_submodule(frozen).state_dict()[key], rtol=0, atol=0)
        assert not any(p.requires_grad for p in leaf.get_submodule(frozen).parameters())
    expected = f"keeps the model's values of {'9 of its 44' if named else '4 of its 12'} parameters"
    assert any(note.startswith(expected) for note in hne.conversion.notes)
    head = [
        leaf.state_dict()["fc.weight" if named else "head.weight"]
        for leaf in (hne.leaf(0), hne.leaf(1))
    ]
    assert torch.equal(*head) == (init == "copy")


def test_nothing_is_said_of_a_model_without_frozen_parameters() -> None:
    architecture = Architecture("small:build", {"classes": 4})
    plain = treeify.hierarchicalize(
        architecture, ["stage1"], init="fresh", example_input=small.EXAMPLE
    )
    assert not any("frozen" in note for note in plain.conversion.notes)


class TemporalShift(nn.Module):
    """Shifts features within clips of 4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.size()
        clips = x.view(images // 4, 4, channels, height, width)
        shifted = torch.cat([clips[:, 1:], clips[:, :1]], 1)
        return self.conv(shifted.view(images, channels, height, width))


@pytest.mark.parametrize("splits", [("1",), ("1", "2.conv"), ("2", "5")])
def test_a_model_that_takes_clips_is_looked_at_with_the_examples_batch(
    splits: tuple[str, ...],
) -> None:
    clips = torch.randn(8, 3, 12, 12)
    model = network(TemporalShift())
    hne = copied(model, splits, clips)
    assert treeify.verify(hne, clips[:4]).worst <= 1
    assert any("batches of 8 images" in note for note in hne.conversion.notes)
    assert not hne.session(clips).droppable


def test_the_batch_that_was_tried_is_named(tmp_path: Any) -> None:
    model = network(TemporalShift())
    with pytest.raises(InputError, match=r"with N = 2: shape"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X[:1])
    with pytest.raises(InputError, match=r"with N = 6: shape"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)
    clips = torch.randn(4, 3, 12, 12)
    hne = copied(model, ["1"], clips)
    treeify.save(hne, tmp_path)
    assert_close(treeify.load(tmp_path, network(TemporalShift()))(clips), hne(clips))


class Rare(nn.Module):
    """Its bias says that one class is rare; reset_parameters knows nothing of that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.constant_(self.head.bias, -4.6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3))) * self.scale


def test_whose_scheme_draws_fresh_weights_is_said() -> None:
    hne = treeify.hierarchicalize(Rare(), ["head"], init="fresh", example_input=X)
    assert any(
        "each layer's reset_parameters" in note
        and "constructor of Rare" in note
        and "'package.module:function'" in note
        for note in hne.conversion.notes
    )
    assert any(note.endswith("again: the model itself") for note in hne.conversion.notes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_model_with_a_graph_for_each_mode_keeps_both(training: bool, nested: bool) -> None:
    extractor = create_feature_extractor(small.SmallNet(), ["head"])
    model = nn.Sequential(OrderedDict(body=extractor)) if nested else extractor
    model.train(training)
    splits = ["body.stage2" if nested else "stage2"]
    hne = treeify.hierarchicalize(model, splits, init="copy", example_input=small.EXAMPLE)
    assert model.training == training
    assert treeify.verify(hne, small.images()).worst <= 1
    x = small.images()
    for mode in (True, False):
        for each in (hne.train(mode), hne.leaf(0)):
            assert torch.equal(each(x)["head"], each(x)["head"]) != mode  # dropout acts


class Named(NamedTuple):
    logits: Tensor
    features: list[Tensor]


@dataclass
class Record:
    logits: Tensor
    features: Any
    nothing: Any = None


class ModelOutput(OrderedDict[str, Any]):
    """As in `transformers`: a dict of those fields that are set."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


@dataclass
class Output(ModelOutput):
    logits: Any = None
    hidden: Any = None
    loss: Any = None


STRUCTURES: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "named tuple": Named,
    "dataclass": Record,
    "ordered dict": lambda y, f: OrderedDict([("z", y), (1, f)]),
    "model output": lambda y, f: Output(logits=y, hidden=tuple(f)),
    "partly set": lambda y, f: Output(logits=y),
    "nested": lambda y, f: {
        "x": [Named(y, [Record(f[0], (f[1],))]), OrderedDict(b=y, a=Record(y, Output(hidden=f)))],
    },
}


class Structured(nn.Module):
    def __init__(self, structure: Callable[[Tensor, list[Tensor]], Any], opaque: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
        self.structure, self.opaque = structure, opaque

    def forward(self, x: Tensor) -> Any:
        if self.opaque and x.sum() > 1e9:  # cannot be traced
            return x
        first = self.a(x)
        second = self.b(first)
        return self.structure(second.mean((2, 3)), [first, second])


def assert_leaf(structure: Any, expected: Any, leaf: int) -> None:
    """Compare one leaf of a structure with what the base model gives, type by type."""
    assert type(structure) is type(expected)
    if isinstance(expected, Tensor):
        assert_close(structure[:, leaf], expected, rtol=1e-4, atol=1e-5)
        return
    if isinstance(expected, dict):
        assert list(structure) == list(expected)
        pairs = list(zip(structure.values(), expected.values(), strict=True))
    else:
        pairs = []
    if isinstance(expected, list | tuple):
        pairs = list(zip(structure, expected, strict=True))
    for name in getattr(expected, "__dataclass_fields__", ()):
        pairs.append((getattr(structure, name), getattr(expected, name)))
    for one, other in pairs:
        assert_leaf(one, other, leaf)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_have_the_models_own_structure(name: str, opaque: bool) -> None:
    model = Structured(STRUCTURES[name], opaque)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), model) if opaque else model
    splits = ["1"] if opaque else ["b"]
    hne = treeify.hierarchicalize(model, splits, init="perturb", example_input=X)
    for execution in ("packed", "looped"):
        hne.execution = execution
        output = hne.eval()(X)
        for leaf in range(2):
            assert_leaf(output, hne.leaf(leaf)(X), leaf)


class Opaque(nn.Module):
    """A batch norm in a module that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.norm(x)


@pytest.mark.parametrize("execution", ["packed", "looped"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_updated_for_averaged_weights(
    execution: str, momentum: float | None
) -> None:
    model = network(nn.BatchNorm2d(8, momentum=momentum), nn.Conv2d(8, 8, 1), Opaque())
    hne = treeify.hierarchicalize(model, ["1", "3"], init="perturb", example_input=X)
    assert "BatchNorm2d" not in str(hne.conversion.fallbacks)
    hne.execution = execution
    leaves = [hne.leaf(index) for index in range(hne.leaves)]
    images = [X, 2 * X + 1, X - 3]
    update_bn(images, hne)
    for index, leaf in enumerate(leaves):
        update_bn(images, leaf)
        buffers = dict(hne.leaf(index).named_buffers())
        for name, buffer in leaf.named_buffers():
            assert_close(buffers[name], buffer, rtol=1e-4, atol=1e-5)


def test_points_without_weights_behind_them_are_not_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten())
    listed = split_points(trace_model(model, example_input=X))
    assert [point.name for point in listed] == ["1"]
    with pytest.raises(SplitError, match=r"no weights behind split '2'(?s:.*)towards the input"):
        treeify.hierarchicalize(model, ["2"], init="fresh", example_input=X)


def test_levels_without_weights_are_refused() -> None:
    layers = OrderedDict(
        a=nn.Conv2d(3, 8, 3), relu=nn.ReLU(), b=nn.Conv2d(8, 8, 3), pool=nn.AdaptiveAvgPool2d(1)
    )
    model = nn.Sequential(
        OrderedDict(**layers, flatten=nn.Flatten(), drop=nn.Dropout(), fc=nn.Linear(8, 5))
    )
    with pytest.raises(
        SplitError, match=r"behind split 'pool' and before 'flatten'(?s:.*)'relu' or 'b'"
    ):
        treeify.hierarchicalize(model, "pool,flatten,drop,fc", init="fresh", example_input=X)
    with pytest.raises(SplitError, match=r"behind split 'relu' and before 'b'(?s:.*)'pool'"):
        treeify.hierarchicalize(model, "relu,b", init="fresh", example_input=X)
    chosen = treeify.hierarchicalize(
        model, 2, init="fresh", example_input=X
    ).conversion.splits.names
    assert chosen == ("relu", "pool")
    with pytest.raises(SplitError, match="no 3 split points with weights between"):
        treeify.hierarchicalize(model, 3, init="fresh", example_input=X)
