"""People come with trained weights: a `.pth`, a checkpoint, a run; and leave with an ensemble."""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
import timm
import torch
from edited import edited
from runner import run
from safetensors.torch import save_file
from timm.utils import CheckpointSaver
from torch import nn
from torch.optim.swa_utils import AveragedModel

import treeify
from treeify.data import Preparation
from treeify.errors import CheckpointError, InitWarning, InputError, ModelError, SplitError
from treeify.models.architecture import Architecture
from treeify.training.model import build
from treeify.training.recipe_file import load_recipe

SPLITS = ["stage1", "stage2"]
BUILDERS = """
import logging, torch
from small import SmallNet

def plain(num_classes=5):
    return SmallNet(num_classes)

def loading(file="mine.pth"):
    model = SmallNet()
    state = torch.load(file)["state_dict"]
    model.load_state_dict({key.removeprefix("x."): value for key, value in state.items()})
    return model

def loading_all_but_its_head():
    model = SmallNet()
    state = torch.load("mine.pth")["state_dict"]
    state = {key: state[key] for key in state if "head" not in key and "stage1" not in key}
    model.load_state_dict(state, strict=False)
    return model

def as_wide_as_its_file(file="mine.pth"):
    return SmallNet(len(torch.load(file)["state_dict"]["head.bias"]))

def downloading(pretrained=False):
    log = logging.getLogger("huggingface_hub.utils._http")
    log.warning("'no route' thrown while requesting HEAD https://hub/model")
    log.warning("Retrying in 1s [Retry 1/5].")
    raise AssertionError("tried again")
"""


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of builders, where the user is."""
    (tmp_path / "mynets.py").write_text(BUILDERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    return tmp_path


def trained(classes: int = 5, seed: int = 3) -> small.SmallNet:
    torch.manual_seed(seed)
    model = small.SmallNet(classes)
    model.stem[1].running_mean.normal_()
    return model.eval()


def converted(weights: Any, model: Any = "mynets:plain", **options: Any) -> Any:
    options = {"init": "copy", "example_input": small.EXAMPLE, **options}
    return treeify.hierarchicalize(model, SPLITS, weights=weights, **options).eval()


def assert_is(network: nn.Module, model: nn.Module) -> None:
    state, expected = network.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def _timm_checkpoint(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    saver = CheckpointSaver(
        *(model, optimizer, argparse.Namespace(model="small", lr=0.1)), checkpoint_dir="."
    )
    saver.save_checkpoint(0, metric=np.float64(71.3))
    Path("last.pth.tar").rename("mine.pth")


def _of_an_old_loop(model: nn.Module) -> None:
    state = {"net": model.state_dict(), "acc": np.float32(0.9), "epoch": 3}
    torch.save(state, "mine.pth", _use_new_zipfile_serialization=False)


def _lightning(model: nn.Module) -> None:
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    state |= {"criterion.weight": torch.ones(5), "accuracy.tp": torch.zeros(5)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.4", "loops": {}}, "mine.pth")


def _torchvision_reference(model: nn.Module) -> None:
    average = AveragedModel(model)
    current = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    torch.save({"model": current, "model_ema": average.state_dict(), "epoch": 1}, "mine.pth")


def _of_several_wrappers(model: nn.Module) -> None:
    state = {f"module._orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save(state, "mine.pth")


def _compiled_inside(model: nn.Module) -> None:
    pairs = model.state_dict().items()
    torch.save({key.replace(".", "._orig_mod.", 1): tensor for key, tensor in pairs}, "mine.pth")


def _half_precision_without_counts(model: nn.Module) -> None:
    model.half().float()
    state = {key: tensor.half() for key, tensor in model.state_dict().items()}
    torch.save({key: state[key] for key in state if "num_batches" not in key}, "mine.pth")


FORMS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "state dict": (lambda model: torch.save(model.state_dict(), "mine.pth"), "weights: mine.pth"),
    "safetensors": (lambda model: save_file(model.state_dict(), "mine.pth"), "weights: mine.pth"),
    "train.py of timm": (_timm_checkpoint, "'state_dict'"),
    "an old loop": (_of_an_old_loop, "'net'"),
    "Lightning": (_lightning, "not under 'model.': criterion.weight, accuracy.tp"),
    "torchvision's references": (_torchvision_reference, "'model_ema' and not 'model'"),
    "DDP and torch.compile": (_of_several_wrappers, "keys without 'module.'"),
    "a compiled part": (_compiled_inside, "weights: mine.pth"),
    "half precision": (_half_precision_without_counts, "cast from float16 to float32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_as_this_writes_it_becomes_every_leaf(form: str) -> None:
    write, note = FORMS[form]
    model = trained()
    write(model)
    hne = converted("mine.pth")
    assert_is(hne.leaf(3), model)
    assert any(note in line for line in hne.conversion.notes), hne.conversion.notes


def test_what_holds_no_weights_or_more_than_that_is_refused_with_the_way_out() -> None:
    model = trained()
    torch.save({"model": model, "epoch": 3}, "whole.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it; people have such files
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "scripted.pth")
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, "other.pth")
    torch.save({"a": model.state_dict(), "b": model.state_dict()}, "two.pth")
    Path("damaged.pth").write_bytes(b"PK\3\4 and no more")
    Path("image.pth").write_bytes(b"\x89PNG\r\n\x1a\n0000")
    Path("empty").mkdir()
    for file, message in {
        "whole.pth": r"Python objects(.|\n)*small.SmallNet(.|\n)*save the state_dict\(\)",
        "scripted.pth": r"Python objects(.|\n)*a TorchScript module",
        "other.pth": r"holds no state dict(.|\n)*'optimizer'",
        "two.pth": r"several state dicts(.|\n)*'a', 'b'",
        "damaged.pth": "cannot be read as weights",
        "image.pth": "cannot be read as weights",
        "nowhere.pth": "no file of weights 'nowhere.pth'",
        "empty": "holds no ensemble",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            converted(file)


def test_weights_of_another_model_are_listed_and_nothing_is_loaded() -> None:
    state = trained().state_dict()
    del state["stem.1.running_mean"]
    torch.save(
        state | {"stem.0.weight": torch.zeros(8, 1, 3, 3), "neck.bias": state["head.bias"]}, "m"
    )
    own = trained(seed=4)
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        converted("m", own)
    for part in (
        "1 missing: stem.1.running_mean",
        "stem.0.weight [8, 1, 3, 3] instead of [8, 3, 3, 3]",
        "1 unexpected: neck.bias",
    ):
        assert part in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items())


def test_another_head_is_allowed_where_classes_were_asked_for_and_said() -> None:
    model = trained(classes=7)
    torch.save(model.state_dict(), "mine.pth")
    with pytest.raises(CheckpointError, match="ask for its 7 classes"):
        converted("mine.pth")
    hne = converted("mine.pth", Architecture("mynets:plain", {"num_classes": 3}))
    assert hne(small.images()).shape == (2, 4, 3)
    assert torch.equal(hne.leaf(1).stage2[0].weight, model.stage2[0].weight)
    assert any("a fresh head, as the weights are for 7 classes" in n for n in hne.conversion.notes)
    assert_is(
        converted("mine.pth", Architecture("mynets:plain", {"num_classes": 7})).leaf(1), model
    )
    state = model.state_dict()
    torch.save({key: state[key] for key in state if "head" not in key}, "headless.pth")
    hne = converted("headless.pth", Architecture("mynets:plain", {"num_classes": 3}))
    assert any("a fresh head, as the weights are without one" in n for n in hne.conversion.notes)
    torch.save(state | {"stage1.0.weight": torch.zeros(7, 8, 3, 3)}, "mine.pth")
    with pytest.raises(CheckpointError, match=r"stage1\.0\.weight"):
        converted("mine.pth", Architecture("mynets:plain", {"num_classes": 3}))


def test_weights_are_never_thrown_away_unasked() -> None:
    model = trained()
    torch.save(model.state_dict(), "mine.pth")
    assert_is(converted("mine.pth", init=None).leaf(0), model)  # perturb
    assert not torch.equal(converted("mine.pth", init=None).leaf(1).head.weight, model.head.weight)
    with pytest.raises(InputError, match=r"would throw the weights of 'mine\.pth' away"):
        converted("mine.pth", init="fresh")
    with pytest.warns(InitWarning, match=r'init="fresh"; init="perturb"(.|\n)*init="copy"'):
        converted(None, model, init=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(None, init=None)
        converted("mine.pth", trained(seed=4), init=None)
        converted(None, model, init="fresh")


@pytest.mark.parametrize("as_run", [False, True])
def test_an_ensemble_goes_on_where_it_splits_alike_and_gives_leaf_0_elsewhere(as_run: bool) -> None:
    first = converted(None, init="fresh", seed=5)
    treeify.save(first, "runs/one/last" if as_run else "one")
    path = "runs/one" if as_run else "one"
    again = converted(path, init=None)
    assert_is(again, first)
    assert any("every branch's own" in note for note in again.conversion.notes)
    wider = treeify.hierarchicalize(
        "mynets:plain", ["stage1:3"], init="copy", weights=path, example_input=small.EXAMPLE
    )
    assert_is(wider.leaf(2), first.leaf(0))
    assert any("weights: leaf 0 of" in note for note in wider.conversion.notes)
    other = converted(path, Architecture("mynets:plain", {"num_classes": 3}))
    assert torch.equal(other.leaf(3).stage2[0].weight, first.leaf(3).stage2[0].weight)
    assert other(small.images()).shape == (2, 4, 3)


def test_a_finished_run_is_trained_on(user: Path) -> None:
    model = converted(None, Architecture("mynets:plain", {"num_classes": 10}), init="fresh", seed=5)
    treeify.save(model, "runs/one/last")
    Path("more.yaml").write_text(
        "{name: more, model: {name: 'mynets:plain', kwargs: {num_classes: 10}, splits: [stage1,"
        " stage2], weights: runs/one}, data: {name: digits}, loss: {name: independent},"
        " schedule: {epochs: 1}}"
    )
    recipe = load_recipe("more.yaml")
    assert recipe.model.init == "perturb"
    assert recipe.model.weights == str(user / "runs/one")
    assert_is(build(recipe, SimpleNamespace(example=lambda: small.EXAMPLE[0])), model)
    for bad in (["model.init=fresh"], ["model.pretrained=true"]):
        with pytest.raises(treeify.TreeifyError, match=r"model.*should have"):
            load_recipe("more.yaml", bad)


def test_fresh_members_that_are_one_network_are_refused() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, "rt.pth")
    loading = Architecture("test_resnet", {"num_classes": 3, "checkpoint_path": "rt.pth"})
    options: Any = {"splits": ["layer3"], "example_input": torch.zeros(1, 3, 32, 32)}
    with pytest.raises(InputError, match=r"one network(.|\n)*init=\"copy\" or init=\"perturb\""):
        treeify.hierarchicalize(loading, **options)
    copied = treeify.hierarchicalize(loading, init="copy", **options)
    assert_is(copied.leaf(1), model)
    torch.save({"state_dict": trained().state_dict()}, "mine.pth")
    with pytest.raises(InputError, match="branches 0 and 1 of level 1"):
        converted(None, "mynets:loading", init="fresh")


def test_members_that_differ_in_a_fresh_head_alone_are_said() -> None:
    torch.save({"state_dict": trained().state_dict()}, "mine.pth")
    hne = converted(None, "mynets:loading_all_but_its_head", init="fresh")
    (note,) = [note for note in hne.conversion.notes if "level 2" in note]
    assert "level 2: 2 of 4 parameters came out the same" in note
    assert "stage2.0.weight" in note
    assert not any("came out" in note for note in converted(None, init="fresh").conversion.notes)


@pytest.mark.parametrize("init", ["fresh", "copy", "perturb"])
def test_a_quantised_head_has_no_weights_that_branches_could_have(init: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it; people have such models
        model = torch.ao.quantization.quantize_dynamic(trained(), {nn.Linear})
        with pytest.raises(SplitError, match="no weights behind split 'head'"):
            treeify.hierarchicalize(model, ["head"], init=init, example_input=small.EXAMPLE)


def test_members_that_begin_alike_by_their_scheme_are_said() -> None:
    class Zero(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)

    model = small.SmallNet()
    model.head = Zero(8, 5, bias=False)
    hne = treeify.hierarchicalize(model, ["head"], init="fresh", example_input=small.EXAMPLE)
    assert any("level 1: branches begin alike" in note for note in hne.conversion.notes)


@pytest.mark.parametrize("builder", ["loading", "as_wide_as_its_file"])
def test_a_saved_ensemble_outlives_the_file_its_builder_loads(
    user: Path, builder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": trained().state_dict()}, "mine.pth")
    hne = converted(None, f"mynets:{builder}", init="copy")
    treeify.save(hne, "saved")
    assert_is(treeify.load("saved", trust=True), hne)
    (user / "mine.pth").unlink()
    (user / "elsewhere").mkdir()
    monkeypatch.chdir(user / "elsewhere")
    if builder == "loading":
        assert_is(treeify.load("../saved", trust=True), hne)
    else:
        with pytest.raises(CheckpointError, match=r"holds all weights(.|\n)*load\(path, model="):
            treeify.load("../saved", trust=True)
        assert_is(treeify.load("../saved", small.SmallNet()), hne)


def test_a_saved_ensemble_names_no_weights_and_says_which_builder_is_missing() -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "rt.pth")
    loading = Architecture("test_resnet", {"num_classes": 3, "checkpoint_path": "rt.pth"})
    hne = treeify.hierarchicalize(
        loading, ["layer3"], init="copy", example_input=torch.zeros(1, 3, 32, 32)
    )
    treeify.save(hne, "saved")
    Path("rt.pth").unlink()
    assert treeify.load("saved", trust=True).architecture == Architecture(
        "test_resnet", {"num_classes": 3}
    )
    with edited(Path("saved/config.json")) as config:
        config["architecture"] = {"name": "gone_module:net", "kwargs": {}}
    with pytest.raises(
        CheckpointError, match=r"'gone_module:net' cannot be built(.|\n)*PYTHONPATH"
    ):
        treeify.load("saved", trust=True)


def test_files_are_packed_on_the_command_line_and_in_python() -> None:
    models = [trained(seed=seed) for seed in range(4)]
    for index, model in enumerate(models):
        torch.save({"state_dict": model.state_dict()}, f"{index}.pth")
    names = [f"{index}.pth" for index in range(4)]
    result = run(
        *("pack", "mynets:plain", *names, "--splits", "stage1,stage2", "--input-size", "8"),
        *("--num-classes", "5", "--no-verify", "--out", "packed"),
    )
    assert result.exit_code == 0, result.output
    assert "leaf 3: weights: 3.pth, 'state_dict'" in result.stdout
    hne = treeify.load("packed", trust=True)
    assert_is(hne, treeify.pack(models, SPLITS, small.EXAMPLE).eval())
    assert hne.architecture == Architecture("mynets:plain", {"num_classes": 5})
    mixed = treeify.pack([models[0], "1.pth"], ["head"], small.EXAMPLE, "mynets:plain")
    assert torch.equal(mixed.leaf(1).head.weight, models[1].head.weight)
    with pytest.raises(ModelError, match="do not say what they are of"):
        treeify.pack(["0.pth", "1.pth"], ["head"], small.EXAMPLE)
    with pytest.raises(ModelError, match="model 0 is not built like the architecture"):
        treeify.pack([small.SmallNet(7), "1.pth"], ["head"], small.EXAMPLE, "mynets:plain")


def test_own_weights_on_the_command_line() -> None:
    model = trained()
    torch.save(model.state_dict(), "mine.pth")
    size = ("--input-size", "8", "--splits", "stage1,stage2", "--no-verify")
    result = run("convert", "mynets:plain", "--weights", "mine.pth", *size, "--out", "one")
    assert result.exit_code == 0, result.output
    assert "weights: mine.pth\ninit: perturb, the model's weights" in result.stdout
    assert_is(treeify.load("one", trust=True).leaf(0), model)
    result = run("convert", "mynets:plain", *size, "--out", "two")
    assert "Init fresh, the default without --weights or --pretrained" in result.stdout
    for options in (("--pretrained",), ("--init", "fresh")):
        result = run("convert", "mynets:plain", "--weights", "mine.pth", *options)
        assert result.exit_code == 2, result.output
    result = run("splits", "mynets:plain", "--input-size", "8", "--weights", "mine.pth")
    assert "weights: mine.pth" in result.stdout
    result = run("splits", "mynets:plain", "--num-classes", "3", "--weights", "one", "--json")
    assert "a fresh head" in json.loads(result.stdout)["notes"][1]


def test_predicting_with_a_file_of_weights_says_how_to_make_an_ensemble() -> None:
    Path("mynet.pth").touch()
    result = run("predict", "mynet.pth", "x.png")
    assert result.exit_code == 2
    assert "mynet.pth is a file, and no ensemble" in result.output
    assert "treeify convert NAME --weights mynet.pth" in result.output


def test_without_a_network_pretrained_weights_fail_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError) as error:
        Architecture("mynets:downloading").build(pretrained=True)
    for part in ("could not be downloaded", "'no route' thrown while requesting", "--weights PATH"):
        assert part in str(error.value)
    assert not caplog.records


def test_an_ensembles_images_and_classes_go_on_with_its_weights() -> None:
    names = ("ant", "bee", "cat", "dog", "eel")
    size = small.EXAMPLE.shape[2:]
    for file, classes in (("first", names), ("second", names), ("other", names[::-1])):
        trained_before = converted(None, init="fresh")
        trained_before.preparation = Preparation(size, (0.2,), (0.4,), classes=classes)
        treeify.save(trained_before, file)
    for splits in (SPLITS, ["stage2"]):  # split alike, and not
        again = treeify.hierarchicalize(
            "mynets:plain", splits, example_input=small.EXAMPLE, weights="first"
        )
        assert again.preparation == Preparation(size, (0.2,), (0.4,), classes=names)
    fewer = converted("first", Architecture("mynets:plain", {"num_classes": 3}))
    assert fewer.preparation.is_known
    assert fewer.preparation.classes is None
    options = {"splits": "head", "example_input": small.EXAMPLE, "architecture": "mynets:plain"}
    assert treeify.pack(["first", "second"], **options).preparation.classes == names
    with pytest.raises(ModelError, match="name other classes"):
        treeify.pack(["first", "other"], **options)


def test_a_plain_state_dict_with_a_modules_extra_state_is_one_state_dict() -> None:
    state = trained().state_dict()
    torch.save({**state, "stem._extra_state": {"scale": torch.ones(1)}}, "mine.pth")
    assert_is(converted("mine.pth").leaf(0), trained())
