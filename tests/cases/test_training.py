"""Fine-tuning as people do it: what they froze, scaled, drew anew, went on with and left over."""

from pathlib import Path

import pytest
import runner
import runs
import small
import timm
import torch
from torch import nn

import treeify
from treeify.errors import RecipeError
from treeify.training import optimizers, state_file
from treeify.training.events import Step
from treeify.training.folder_recipe import FINE_TUNING
from treeify.training.model import build
from treeify.training.optimization_recipe import OptimizerRecipe
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = """\
name: small
model: {name: "small:build", kwargs: {classes: 10}, splits: [stage1, "stage2:3"]}
data: {name: "runs:noise"}
loss: {name: hierarchical_distillation}
schedule: {epochs: 2}
batch_size: 25
device: cpu
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def ensemble(recipe: Recipe) -> treeify.HierarchicalEnsemble:
    return build(recipe, recipe.data.load())


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Every parameter's factor of the learning rate, and its weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# What stays as it is.


@pytest.mark.parametrize("init", ["fresh", "copy", "perturb"])
def test_frozen_levels_and_names_keep_the_models_weights_in_every_branch(
    file: Path, init: str
) -> None:
    model = ("model.freeze=[level 0, 'stage2.*', head.bias]", f"model.init={init}")
    hne = ensemble(load_recipe(file, model))
    leaves = [dict(hne.leaf(index).named_parameters()) for index in range(hne.leaves)]
    frozen = {name for name, parameter in leaves[0].items() if not parameter.requires_grad}
    assert frozen == {
        *("stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"),
        *("stage2.0.weight", "stage2.0.bias", "head.bias"),
    }
    for name in frozen:
        assert all(torch.equal(leaf[name], leaves[0][name]) for leaf in leaves)
    assert torch.equal(leaves[0]["head.weight"], leaves[5]["head.weight"]) == (init == "copy")


@pytest.mark.parametrize("execution", ["packed", "looped"])
def test_a_frozen_trunk_is_the_same_after_training_and_resuming(file: Path, execution: str) -> None:
    recipe = load_recipe(
        file,
        [
            *("model.freeze=[level 0, stage1]", "model.freeze_norms=true", "model.init=perturb"),
            *("optimizer.name=adamw", "optimizer.lr=0.01", "optimizer.weight_decay=0.5"),
            *("ema={decay: 0.5}", f"execution={execution}"),
        ],
    )
    before = ensemble(recipe).state_dict()
    train(recipe, out="whole")
    train(recipe, out="stopped", reporter=runs.InterruptAt(3))
    again = train(recipe, resume="stopped").run.hne.train()
    runs.assert_same_bits(Path("whole"), Path("stopped"))
    assert not again.get_submodule("stem.1").training
    for checkpoint in ("last", "last/ema"):
        after = treeify.load(Path("whole") / checkpoint, trust=True).state_dict()
        same = {name for name in before if torch.equal(before[name], after[name])}
        # The counter of batches too: nothing of a norm moves.
        assert same == {name for name in before if name.startswith(("stem.", "stage1."))}
    state = state_file.read_state(Path("whole/last"))["optimizer"]["state"]
    assert len(state) == len(["stage2.0.weight", "stage2.0.bias", "head.weight", "head.bias"])


def test_frozen_norms_still_follow_the_images_unless_asked(file: Path) -> None:
    recipe = load_recipe(file, ["model.freeze=[stem]", "schedule.epochs=1"])
    before = ensemble(recipe).state_dict()
    after = train(recipe).run.hne.state_dict()
    assert torch.equal(before["stem.1.weight"], after["stem.1.weight"])
    assert not torch.equal(before["stem.1.running_mean"], after["stem.1.running_mean"])


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("model.freeze=[level 3]", r"'level 3'(?s:.)*level 0, level 1 \(from stage1\), level 2"),
        ("model.freeze=[stage3]", r"'stage3'(?s:.)*did you mean 'stage[12]'"),
        ("model.freeze=['*']", "leaves nothing to train"),
        ("model.freeze_norms=true", "freeze something"),
        (
            "model={name: 'small:build', freeze: [head], head: fresh}",
            "'head.bias', which model.he",
        ),
        ("optimizer.level_rates=[0.1, 1.0]", r"3 factors: level 0, level 1 (?s:.)*Found 2"),
        ("optimizer.level_rates=[0.0, 1.0, 1.0]", "greater than 0"),
        ("optimizer.layer_decay=0.7", "SmallNet does not say how its parameters(?s:.)*level_rates"),
    ],
)
def test_what_cannot_be_frozen_or_scaled_is_said_before_anything_is_written(
    file: Path, override: str, match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        train(load_recipe(file, [override]))
    assert [path.name for path in Path().iterdir()] == ["small.yaml"]


def test_a_frozen_norm_that_has_no_mode_of_its_own_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Functional(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            statistics = (self.running_mean, self.running_var)
            return nn.functional.batch_norm(
                x, *statistics, self.weight, self.bias, training=self.training
            )

    def net(classes: int) -> nn.Module:
        model = small.build(classes)
        model.stem[1] = Functional(8)
        return model

    monkeypatch.setattr(small, "net", net, raising=False)
    options = ["model.name=small:net", "model.freeze=[stem]", "model.freeze_norms=true"]
    with pytest.raises(RecipeError, match=r"'stem.1.running_mean' is updated by F.batch_norm"):
        ensemble(load_recipe(file, options))


# Learning rates.


def test_levels_learn_at_their_own_rates(file: Path) -> None:
    recipe = load_recipe(file, ["optimizer.level_rates=[0.1, 0.3, 1.0]", "optimizer.lr=0.2"])
    hne = ensemble(recipe)
    optimizer = optimizers.optimizer(recipe.optimizer, hne)
    scales = {name: scale for name, (scale, _) in rates(optimizer, hne).items()}
    assert scales.keys() == dict(hne.named_parameters()).keys()
    assert {scales["stem.0.weight"], scales["stem.1.bias"]} == {0.1}
    assert scales["stage1.0.weight"] == 0.3
    assert scales["head.bias"] == 1.0
    recorder = runs.Recorder()
    train(recipe, reporter=recorder)
    assert recorder.of(Step)[0].lr == pytest.approx(0.2)  # the full rate is what is reported
    groups = state_file.read_state(Path("runs/small/last"))["optimizer"]["param_groups"]
    assert [group["lr_scale"] for group in groups] == [0.1, 0.3, 1.0]


@pytest.mark.parametrize(("name", "split"), [("test_vit", "blocks.3"), ("test_resnet", "layer3")])
def test_layer_decay_and_weight_decay_are_those_of_the_base_model(name: str, split: str) -> None:
    model = timm.create_model(name, num_classes=3)
    hne = treeify.hierarchicalize(model, [split], init="copy")
    for decay in (0.5, None):
        options = {"lr": 1.0, "weight_decay": 0.05, "layer_decay": decay}
        expected = rates(timm.optim.create_optimizer_v2(model, "adamw", **options), model)
        rule = OptimizerRecipe(name="adamw", filter_bias_and_bn=True, **options)
        assert rates(optimizers.optimizer(rule, hne), hne) == expected
        scales = {scale for scale, _ in expected.values()}
        assert (len(scales) > 3) == (decay is not None)
        if name == "test_vit":
            assert expected["cls_token"][1] == expected["pos_embed"][1] == 0
        both = rule.model_copy(update={"level_rates": [0.1, 1.0]})
        for key, (scale, weight_decay) in rates(optimizers.optimizer(both, hne), hne).items():
            factor = 0.1 if hne.branches_of(key) == 1 else 1.0
            assert (scale, weight_decay) == (expected[key][0] * factor, expected[key][1])


def test_a_model_that_groups_no_layers_has_no_methods_of_timm() -> None:
    assert not hasattr(small.ensemble(), "group_matcher")
    assert not hasattr(small.ensemble(), "no_weight_decay")


# A fresh classifier.


@pytest.mark.parametrize(
    ("name", "kwargs", "split", "prefix"),
    [
        ("test_resnet", "num_classes: 10", "layer4", "fc."),
        ("test_vit", "num_classes: 10, img_size: 32", "blocks.5", "head."),
        ("small:build", "classes: 10", "stage2", "head."),
    ],
)
def test_a_fresh_head_on_a_copied_trunk(
    file: Path, name: str, kwargs: str, split: str, prefix: str
) -> None:
    model = f"name: '{name}', kwargs: {{{kwargs}}}, splits: [{split}], init: copy"
    size = "data.size=32"
    fresh = load_recipe(file, [size, f"model={{{model}, head: fresh}}"])
    kept, hne = ensemble(load_recipe(file, [size, f"model={{{model}}}"])), ensemble(fresh)
    for key, value in hne.leaf(1).state_dict().items():
        if not key.startswith(prefix):
            assert torch.equal(value, kept.leaf(1).state_dict()[key])
    first, second = (hne.leaf(index).state_dict()[f"{prefix}weight"] for index in range(2))
    assert not torch.equal(first, second)
    if name == "small:build":
        assert torch.equal(ensemble(fresh).leaf(1).state_dict()["head.weight"], second)


LOADING = """
import small, torch

def trunk():
    model = small.build(classes=10)
    model.load_state_dict(torch.load("trunk.pth", weights_only=True))
    return model
"""


@pytest.mark.parametrize("splits", ["[stage2]", "[]"])
def test_a_fresh_head_of_a_builder_that_loads_weights_is_refused(file: Path, splits: str) -> None:
    (file.parent / "loading_nets.py").write_text(LOADING)
    torch.save(small.build(classes=10).state_dict(), "trunk.pth")
    model = f"name: 'loading_nets:trunk', splits: {splits}, init: copy, head: fresh"
    with pytest.raises(RecipeError, match=r"loads the weights of its classifier \('head.weight"):
        ensemble(load_recipe(file, [f"model={{{model}}}"]))


# Going on.


def test_a_finished_run_is_trained_on(file: Path) -> None:
    recipe = load_recipe(file, ["schedule.epochs=1", "schedule.warmup_epochs=0.5"])
    train(recipe, out="run")
    done = runner.run("train", "--resume", "run", "--more-epochs", "1")
    assert done.exit_code == 0, done.output
    assert "2 epochs now instead of 1" in done.output
    assert "cosine schedule of 2 epochs" in done.output
    recorded = load_recipe("run/recipe.yaml")
    assert recorded.schedule.epochs == 2
    assert recorded.schedule.extended == [1]
    # Its recipe says all: trained at one go, the weights are the same.
    train(recorded, out="at_once")
    runs.assert_same_bits(Path("run"), Path("at_once"))
    stopped = runner.run("train", "--resume", "run", "--more-epochs", "1", "workers=0")
    assert stopped.exit_code == 0
    assert load_recipe("run/recipe.yaml").schedule.extended == [1, 2]
    assert runner.run("train", "--resume", "run").exit_code == 0


def test_more_epochs_of_a_stopped_run_come_after_those_it_had(file: Path) -> None:
    recipe = load_recipe(file)
    train(recipe, out="run", reporter=runs.InterruptAt(1))
    recorder = runs.Recorder()
    result = train(recipe, resume="run", more_epochs=1, reporter=recorder)
    assert result.last is not None
    assert result.last.epoch == 3
    lrs = [step.lr for step in recorder.of(Step)]
    assert len(lrs) == 5
    assert lrs[2] < lrs[3] > lrs[4]  # the old schedule to its end, then the longer one's last third


def test_a_run_of_a_builder_with_trained_weights_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(classes: int, pretrained: bool = False) -> nn.Module:
        model = small.build(classes)
        if pretrained:
            nn.init.constant_(model.stem[0].weight, 0.5)
        return model

    monkeypatch.setattr(small, "trained", trained, raising=False)
    options = ["model.name=small:trained", "model.pretrained=true", "model.init=perturb"]
    recipe = load_recipe(file, [*options, "model.freeze=[stem.0.weight]"])
    train(recipe, out="run", reporter=runs.InterruptAt(1))
    hne = train(recipe, resume="run").run.hne
    assert torch.equal(hne.get_parameter("stem.0.weight"), torch.full((8, 3, 3, 3), 0.5))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["small.yaml", "--more-epochs", "1"], "no run to make longer"),
        (["--resume", "nothing"], "'nothing' holds no run"),
        (["--resume", "run", "schedule.epochs=3"], "--resume run --more-epochs N"),
        (["--resume", "run", "--out", "there"], "leave --out"),
        (["small.yaml", "--resume", "run", "--data", "photos", "--model", "x"], "neither a recipe"),
        ([], "there is no recipe"),
        (["run"], "treeify train --resume run"),
        (["resnet18"], "--data FOLDER --model resnet18"),
        (["photos/"], "treeify train --data photos --model resnet18"),
        (["--data", "photos"], "--model NAME"),
        (["--model", "resnet18"], "--data FOLDER"),
        (["--data", "nothing", "--model", "resnet18"], "no such directory"),
        (["--data", "shared", "--model", "resnet18"], "Rename the folder of images held out"),
        (["--data", "photos", "--model", "small:build"], "nothing says which size of images"),
        (["--weights", "net.pth"], "--data FOLDER"),
        (["--data", "photos", "--model", "resnet81"], "Did you mean 'resnet18'"),
    ],
)
def test_a_command_that_is_not_complete_says_what_to_do(
    file: Path, arguments: list[str], match: str
) -> None:
    runs.photos(Path("photos"), each=2)
    for part in ("train", "test"):
        (Path("shared") / part).mkdir(parents=True)
    train(load_recipe(file, ["schedule.epochs=1"]), out="run")
    done = runner.run("train", *arguments)
    assert done.exit_code == 2, done.output
    assert match in done.output


# A folder and a model's name.


def test_a_folder_of_images_is_trained_on_without_a_recipe(file: Path) -> None:
    runs.photos(Path("my photos"), size=40, each=3)
    done = runner.run(
        *("train", "--data", "my photos", "--model", "test_resnet", "--epochs", "1"),
        *("data.size=32", "workers=0", "model.splits=1"),
    )
    assert done.exit_code == 0, done.output
    run = Path("runs/my_photos_test_resnet")
    assert str(run) in done.output
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.model.kwargs == {"num_classes": 2}
    assert recipe.model.init == "fresh"
    assert recipe.schedule.warmup_epochs == 0.1
    assert treeify.load(run / "last", trust=True).leaves == 2


def test_what_is_not_said_of_a_folder_is_as_in_the_recipe_file() -> None:
    recipe = load_recipe(RECIPES / "finetune_image_folder.yaml").model_dump()
    for section, values in FINE_TUNING.items():
        if isinstance(values, dict):
            assert values.items() <= recipe[section].items()
        else:
            assert recipe[section] == values


def test_the_recipe_with_a_frozen_trunk_trains(tmp_path: Path) -> None:
    runs.photos(tmp_path / "photos", size=40, each=4)
    trained = timm.create_model("test_resnet")
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    recipe = load_recipe(
        RECIPES / "finetune_frozen_trunk.yaml",
        [
            *("model.name=test_resnet", "model.kwargs.num_classes=2", "model.splits=[layer3, fc]"),
            f"model.kwargs.pretrained_cfg_overlay.file={tmp_path}/weights.pth",
            *(f"data.root={tmp_path / 'photos'}", "data.size=32", "data.like=null"),
            *("optimizer.level_rates=[0.1, 0.3, 1.0]", "schedule={epochs: 1, warmup_epochs: 0.5}"),
            *("batch_size=4", "workers=0"),
        ],
    )
    hne = train(recipe, out=tmp_path / "run").run.hne.train()
    leaf = hne.leaf(3).state_dict()
    trunk = [key for key in leaf if hne.branches_of(key) == 1]
    assert trunk
    assert all(torch.equal(leaf[key], trained.state_dict()[key]) for key in trunk)
    assert not torch.equal(leaf["layer3.0.conv1.weight"], hne.leaf(0).layer3[0].conv1.weight)


# One image left over.

NARROW = """\
from torch import nn


def net(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, num_classes)
    )
"""


@pytest.fixture
def narrow(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of 51 images whose model has a batch norm of features of one pixel."""
    monkeypatch.syspath_prepend(file.parent)
    Path("narrow.py").write_text(NARROW)
    file.write_text(
        SMALL.replace("small:build", "narrow:net")
        .replace("{classes: 10}", "{}")
        .replace('[stage1, "stage2:3"]', "['4']")
        .replace('"runs:noise"', '"runs:noise", train: 51')
    )
    return file


@pytest.mark.parametrize("override", ["batch_size=25", "gradient_accumulation=20"])
def test_one_image_left_over_is_not_trained_on_alone(narrow: Path, override: str) -> None:
    recipe = load_recipe(narrow, [override])
    whole = runs.Recorder()
    warnings: list[str] = []
    whole.warned = warnings.append  # type: ignore[method-assign]
    train(recipe, out="whole", reporter=whole)
    assert len(whole.of(Step)) == 2 * 2  # of 25 and 26 images
    assert "cannot be trained on one image at a time" in warnings[0]
    train(recipe, out="stopped", reporter=runs.InterruptAt(3))
    train(recipe, resume="stopped")
    runs.assert_same_bits(Path("whole"), Path("stopped"))


def test_steps_of_one_image_are_refused_before_the_first(narrow: Path) -> None:
    with pytest.raises(RecipeError, match=r"one image at a time(?s:.)*batch_size=1"):
        train(load_recipe(narrow, ["batch_size=1"]))
    assert not Path("runs").exists()


def test_a_model_that_takes_one_image_is_trained_on_what_is_left_over(file: Path) -> None:
    recorder = runs.Recorder()
    train(load_recipe(file, ["batch_size=49", "schedule.epochs=1"]), reporter=recorder)
    assert len(recorder.of(Step)) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("sync", ["true", "false"])
def test_two_processes_leave_no_image_alone_either(narrow: Path, sync: str) -> None:
    """The last step has two, which one of the processes gets, in the first of its three parts."""
    arguments = ("data.train=52", "gradient_accumulation=3", f"sync_batch_norm={sync}")
    assert runs.run_in_two(narrow, *arguments, "--out", "run", cwd=narrow.parent) == [0, 0]
    state = treeify.load("run/last", trust=True).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
