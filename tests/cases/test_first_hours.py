"""What people try in their first hours: an own model, its .pth, and a folder of images."""

import json
from pathlib import Path

import pytest
import runs
import torch
from runner import run
from torch import nn

import treeify
from treeify.evaluation.comparison import Gain, verdict
from treeify.training.recipe_file import load_recipe

GREY = """\
from torch import nn


def net(num_classes=2):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, num_classes),
    )
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a user's grey_net.py, its trained weights, and folders of classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    (tmp_path / "grey_net.py").write_text(GREY)
    names: dict = {}
    exec(GREY, names)
    torch.manual_seed(0)
    net: nn.Module = names["net"]()
    torch.save(net.state_dict(), "net.pth")
    runs.photos(tmp_path / "parts")
    (tmp_path / "parts" / "train").rename(tmp_path / "photos")
    return tmp_path


def test_a_folder_of_classes_and_a_pth_are_trained_on_without_a_recipe(here: Path) -> None:
    arguments = ("--data", "photos", "--model", "grey_net:net", "--weights", "net.pth")
    done = run("train", *arguments, "--input-size", "12", "--epochs", "1", "model.splits=1")
    assert done.exit_code == 0, done.output
    assert "the 4 of 16 images of" in done.output
    assert "Images: 1 x 12 x 12" in done.output
    recipe = load_recipe("runs/photos_grey_net_net/recipe.yaml")
    assert recipe.model.init == "perturb"
    assert recipe.data.options["crop_padding"] == 1
    mine = ("runs/photos_grey_net_net", "--trust")
    shown = json.loads(run("eval", *mine, "--no-latency", "--json").stdout)
    assert shown["base"]["weights"] == str(here / "net.pth")
    assert shown["split"].startswith("the 4 of 16 images of")


def test_convert_keeps_how_images_of_an_own_model_are_prepared(here: Path) -> None:
    arguments = ("grey_net:net", "--weights", "net.pth", "--input-size", "12", "--splits", "1")
    done = run("convert", *arguments, "--mean", "0.5", "--std", "0.25", "--no-verify")
    assert done.exit_code == 0, done.output
    hne = treeify.load("converted/grey_net_net", trust=True)
    assert hne.preparation is not None
    assert (hne.preparation.mean, hne.preparation.std) == ((0.5,), (0.25,))
    shown = run("predict", "converted/grey_net_net", "photos/dark/0.png", "--trust")
    assert shown.exit_code == 0, shown.output
    assert "Images: 1 x 12 x 12, mean 0.5, std 0.25" in shown.output
    alone = run("convert", *arguments, "--mean", "0.5", "--out", "other")
    assert alone.exit_code == 2
    assert "alone" in alone.output


def test_a_size_that_nothing_says_is_said_to_be_a_guess(here: Path) -> None:
    guess = "does not say which size of images it takes: 224 x 224"
    assert guess in run("splits", "grey_net:net").output
    assert guess in run("convert", "grey_net:net", "--splits", "1", "--no-verify").output
    assert "does not say" not in run("splits", "grey_net:net", "--input-size", "12").output
    assert "does not say" not in run("splits", "test_resnet").output


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("grey_net", "grey_net:FUNCTION"),
        ("grey_net.py", "grey_net:FUNCTION"),
        ("net.pth", "NAME --weights net.pth"),
        ("others:instance", "is a network already"),
        ("others:plain", "It is called as plain(num_classes=3)"),
        ("", "there is no model ''"),
    ],
)
def test_what_is_typed_instead_of_a_models_name(here: Path, name: str, advice: str) -> None:
    (here / "others.py").write_text(
        "from grey_net import net\n\ninstance = net()\n\n\ndef plain():\n    return net()\n"
    )
    done = run("convert", name, "--num-classes", "3")
    assert done.exit_code == 2
    assert advice in done.output


@pytest.mark.parametrize("splits", ["1,2", "[1, 2]", '["1", "2"]'])
def test_splits_of_a_sequential_are_named_by_numbers(here: Path, splits: str) -> None:
    options = ["model.name=grey_net:net", "model.kwargs={}", f"model.splits={splits}"]
    recipe = load_recipe(runs.tiny(here), options)
    assert recipe.model.splits == ["1", "2"]


def test_leaves_that_are_worse_than_one_are_called_so() -> None:
    worse = verdict(Gain(4, gain=-3.8, error=0.3, disagreement=18.0), 2.9, 25.6, 10_000)
    assert worse is not None
    assert "noise" not in worse
    assert "which 10,000 images tell from chance" in worse
