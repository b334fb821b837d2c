"""Every recipe against the paper's tables: layers, MACs and training."""

from pathlib import Path

import pytest
import torch
from torch import nn

import treeify
from treeify.errors import RecipeError
from treeify.models.architecture import Architecture
from treeify.tracing.facts import facts
from treeify.training.recipe_file import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
GRIDS = sorted(path for path in FOLDER.rglob("*.yaml") if "\nvariants:" in path.read_text())
FILES = sorted(set(FOLDER.rglob("*.yaml")) - set(GRIDS))
CIFAR = ("cifar_resnet_hne", "cifar10_resnet_hne")
ABLATIONS = [path.stem for path in FILES if path.parent.name == "ablations"]


def converted(name: str, size: int) -> treeify.HierarchicalEnsemble:
    model = load_recipe(FOLDER / f"{name}.yaml").model
    hne = treeify.hierarchicalize(
        Architecture(model.name, model.kwargs),
        model.splits,
        model.fanout,
        init="fresh",
        example_input=torch.zeros(1, 3, size, size),
    )
    return hne.eval()


def resolutions(hne: treeify.HierarchicalEnsemble) -> dict[str, int]:
    """Height of what every module gives."""
    return {
        str(node.target): facts(node).tensors[0].shape[-1]
        for node in hne.traced.graphs[False].nodes
        if node.op == "call_module" and len(facts(node).tensors[0].shape) == 4
    }


def layer(hne: treeify.HierarchicalEnsemble, name: str, branches: int) -> tuple[int, ...]:
    """Kernel, channels in and out, groups, all of one branch; stride and resolution."""
    conv = hne.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    per_branch = (conv.in_channels, conv.out_channels, conv.groups)
    assert all(channels % branches == 0 for channels in per_branch)
    return (
        kernel,
        *(channels // branches for channels in per_branch),
        stride,
        resolutions(hne)[name],
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_says_its_source_and_extends_what_it_says(path: Path) -> None:
    recipe = load_recipe(path)
    text = path.read_text()
    assert text.startswith("#")
    assert "\n# Source: " in text
    assert path.stem in recipe.name or path.parent.name == "ablations"


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_layers_are_table_2(name: str, width: float) -> None:
    small = "_small" if width == 0.5 else ""
    hne = converted(name + small, 32)
    assert (hne.leaves, hne.tree.branches) == (16, (1, 2, 4, 8, 16))
    c = lambda channels: int(channels * width)  # noqa: E731
    assert layer(hne, "stem.0", 1) == (3, 3, c(16), 1, 1, 32)
    assert layer(hne, "stem.3", 1) == (1, c(16), c(64), 1, 1, 32)
    # Table 2: block, channels out, layers, stride, resolution, branches ("groups out").
    table = (
        *((1, 64, 3, 1, 32, 2), (2, 128, 4, 2, 16, 4)),
        *((3, 256, 4, 2, 8, 8), (4, 256, 5, 1, 8, 16)),
    )
    inputs = 64
    for block, outputs, layers, stride, size, branches in table:
        for index in range(layers):
            at = f"block{block}.{index}"
            step, before = (stride, size * stride) if index == 0 else (1, size)
            narrow = c(outputs) // 4
            assert layer(hne, f"{at}.conv1", branches) == (1, c(inputs), narrow, 1, 1, before)
            assert layer(hne, f"{at}.conv2", branches) == (3, narrow, narrow, narrow, step, size)
            assert layer(hne, f"{at}.conv3", branches) == (1, narrow, c(outputs), 1, 1, size)
            for norm, channels in (("bn1", narrow), ("bn2", narrow), ("bn3", c(outputs))):
                assert hne.get_submodule(f"{at}.{norm}").num_features == channels * branches
            if index == 0:
                skip = layer(hne, f"{at}.shortcut.0", branches)
                assert skip == (1, c(inputs), c(outputs), 1, stride, size)
            inputs = outputs
        assert f"block{block}.{layers}" not in dict(hne.named_modules())
    classes = 10 if "cifar10_" in name else 100
    head = hne.get_submodule("head")
    assert head.weight.shape == (16 * classes, c(256))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar_resnet_hne", [53, 68, 110, 207, 412]),
        ("cifar_resnet_hne_small", [14, 18, 29, 54, 107]),
    ],
)
def test_cifar_macs_are_the_papers(name: str, millions: list[int]) -> None:
    hne = converted(name, 32)
    assert [round(hne.count_macs(size) / 1e6) for size in hne.tree.nested_sizes] == millions


def test_imagenet_layers_are_table_3() -> None:
    hne = converted("imagenet_mobilenetv2_140_hne", 224)
    assert (hne.leaves, hne.tree.branches) == (16, (1, 2, 4, 8, 16))
    assert layer(hne, "stem.0.0", 1) == (3, 3, 24, 1, 2, 112)
    assert layer(hne, "stem.1.0", 1) == (3, 24, 24, 24, 1, 112)
    # Table 3: block, channels out, layers, stride, resolution, branches.
    table = (
        *((1, 32, 2, 2, 56, 1), (2, 48, 3, 2, 28, 2), (3, 88, 4, 2, 14, 4)),
        *((4, 136, 3, 1, 14, 8), (5, 224, 3, 2, 7, 16)),
    )
    inputs = 24
    for block, outputs, layers, stride, size, branches in table:
        for index in range(layers):
            at = f"block{block}.{index}.conv"
            step, before = (stride, size * stride) if index == 0 else (1, size)
            wide = 6 * inputs
            assert layer(hne, f"{at}.0.0", branches) == (1, inputs, wide, 1, 1, before)
            assert layer(hne, f"{at}.1.0", branches) == (3, wide, wide, wide, step, size)
            assert layer(hne, f"{at}.2", branches) == (1, wide, outputs, 1, 1, size)
            inputs = outputs
        assert f"block{block}.{layers}" not in dict(hne.named_modules())
    assert layer(hne, "conv.0", 16) == (1, 224, 1344, 1, 1, 7)
    assert hne.get_submodule("head.0").weight.shape == (16 * 1792, 1344)
    assert hne.get_submodule("head.2").weight.shape == (16 * 1000, 1792)


@pytest.mark.parametrize("name", [*CIFAR, *(f"{small}_small" for small in CIFAR)])
def test_cifar_training_is_appendix_a(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    rule, schedule = recipe.optimizer, recipe.schedule
    assert (rule.name, rule.lr, rule.momentum, rule.weight_decay) == ("momentum", 0.1, 0.9, 5e-4)
    assert not rule.filter_bias_and_bn
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ("cosine", 200, 0)
    assert (recipe.batch_size, recipe.model.init) == (128, "fresh")
    assert (recipe.data.options["crop_padding"], recipe.data.options["flip"]) == (4, True)
    assert recipe.loss.name == "hierarchical_distillation"
    assert recipe.loss.options == {"alpha": 0.5, "temperature": 2.0, "scale_by_t2": False}


def test_imagenet_training_is_appendix_a() -> None:
    recipe = load_recipe(FOLDER / "imagenet_mobilenetv2_140_hne.yaml")
    rule, schedule = recipe.optimizer, recipe.schedule
    assert (rule.name, rule.lr, rule.momentum, rule.weight_decay) == ("momentum", 0.1, 0.9, 1e-5)
    assert (schedule.name, schedule.epochs, recipe.batch_size) == ("cosine", 120, 256)


def test_ablations_differ_from_the_hne_in_what_they_say() -> None:
    usual = load_recipe(FOLDER / "cifar_resnet_hne.yaml")
    others = {name: load_recipe(FOLDER / "ablations" / f"{name}.yaml") for name in ABLATIONS}
    for name in ("independent", "structured", "co_distillation"):
        assert others[name].loss.name == name
    assert others["independent_networks"].model.splits == ["input:16"]
    assert others["multi_branch"].model.splits == ["block3:16"]
    for other in others.values():
        same = {"name": usual.name, "loss": usual.loss}
        assert other.model_copy(update={**same, "model": usual.model}) == usual


def test_a_recipe_extends_another_and_is_overridden(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((FOLDER / "digits_hne.yaml").read_text())
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nname: child\nloss: {name: independent}\nseed: 3\n")
    recipe = load_recipe(child, ["optimizer.lr=0.2"])
    assert (recipe.name, recipe.seed, recipe.optimizer.lr) == ("child", 3, 0.2)
    assert (recipe.loss.name, recipe.loss.options) == ("independent", {})
    assert recipe.model == load_recipe(tmp_path / "base.yaml").model
    child.write_text("extends: base.yaml\noptimizer:\n  lrr: 1.0\n")
    with pytest.raises(RecipeError, match=r"optimizer.lrr \(line 3\): unknown key"):
        load_recipe(child)
    (tmp_path / "base.yaml").write_text("name: base\nbatch: 3\n")
    with pytest.raises(RecipeError, match=r"batch \(line 2 of base.yaml\): unknown key"):
        load_recipe(child)
    (tmp_path / "base.yaml").write_text("extends: child.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(child)
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(RecipeError, match=r"(?s)base.yaml.*cannot be read.*child.yaml"):
        load_recipe(child)
