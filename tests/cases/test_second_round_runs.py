"""Data, training and first hours that went wrong elsewhere: the second round (README.md)."""

import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from cli import saved_ensembles
from PIL import Image
from runner import run

import treeify
from treeify import data
from treeify.cli.app import app
from treeify.errors import DataError, RecipeError
from treeify.training import loaders, optimizers
from treeify.training.events import Step
from treeify.training.optimization_recipe import ScheduleRecipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import DivergedError, train

PREDICT = ("--mean", "0", "--std", "1", "--json")
NET = ("model.name=own:net", "model.kwargs={}", "model.splits=['3']")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is, with a model of the user's own beside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    for name in ("own", "noise_data", "weighted"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "own.py").write_text(runs.NORMLESS)
    return tmp_path


def trained(folder: Path, *overrides: str, reporter: runs.Recorder | None = None) -> Path:
    """A run of the tiny recipe with the user's model, and what it reported."""
    recipe = load_recipe(runs.tiny(folder), [*NET, "threads=1", "device=cpu", *overrides])
    return train(recipe, reporter=reporter).run.directory


# Training


def test_mixup_of_an_odd_number_of_images(here: Path) -> None:
    recorder = runs.Recorder()
    trained(here, "batch_size=99", "mix={mixup: 0.4}", "schedule.epochs=1", reporter=recorder)
    steps = recorder.of(Step)
    assert len(steps) == 4  # 300 images: three steps of 99 and one of 3


def test_the_learning_rate_goes_on_where_a_run_stopped(here: Path) -> None:
    options = ("schedule.warmup_epochs=1", "schedule.epochs=3", "name=whole")
    whole = runs.Recorder()
    trained(here, *options, reporter=whole)
    recipe = load_recipe(here / "tiny.yaml", [*NET, "threads=1", "device=cpu", *options])
    first, second = runs.Recorder(), runs.Recorder()
    interrupt = runs.InterruptAt(4)
    first.stepped = lambda step: (first.events.append(step), interrupt.stepped(step))
    train(recipe, out=here / "stopped", reporter=first)
    train(recipe, resume=here / "stopped", reporter=second)
    rates = [[step.lr for step in each.of(Step)] for each in (whole, first, second)]
    assert rates[1] + rates[2] == rates[0]


@pytest.mark.parametrize("name", ["cosine", "tanh"])
def test_a_warm_up_meets_the_schedule_without_a_jump(name: str) -> None:
    schedule = ScheduleRecipe(name=name, epochs=8, warmup_epochs=5)
    assert "falls to" in str(optimizers.cliff(schedule, 0.05, 3))
    schedule = schedule.model_copy(update={"options": {"warmup_prefix": True}})
    assert optimizers.cliff(schedule, 0.05, 3) is None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler, rates = optimizers.scheduler(schedule, optimizer, 3), []
    for step in range(24):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    # Five epochs of three steps up, and from there on what a run of three epochs has.
    assert max(rates) == rates[15] == pytest.approx(0.05)
    if name == "cosine":
        falling = [0.025 * (1 + np.cos(np.pi * step / 9)) for step in range(9)]
        assert rates[15:] == pytest.approx(falling)


def test_a_warm_up_that_ends_in_a_cliff_is_said(here: Path) -> None:
    recorder, warned = runs.Recorder(), []
    recorder.warned = warned.append
    trained(here, "schedule={epochs: 2, warmup_epochs: 1}", reporter=recorder)
    (text,) = warned
    assert "falls to 0.025 at once" in text


def test_a_loss_that_is_no_number_stops_the_run(here: Path) -> None:
    options = ("optimizer.lr=1e4", "schedule.epochs=5", "checkpoints.minutes=1e-9")
    with pytest.raises(DivergedError, match="step"):
        trained(here, *options)
    last = here / "runs/tiny/last"
    if last.exists():
        assert all(tensor.isfinite().all() for tensor in runs.weights(here / "runs/tiny").values())


OWN_DATA = """\
import numpy as np, torch
from torch.utils.data import Dataset
from treeify.data import Data

class Noise(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.full((3, 8, 8), float(np.random.rand())), index % 2

class Numbered(Noise):
    def __init__(self, first):
        self.first = first
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), self.first + index % 2

def noise():
    return Data(Noise(), Noise(), ("a", "b"), "of noise")

def from_one():
    return Data(Numbered(1), Numbered(1), ("a", "b"), "numbered from one")
"""


def test_numpys_random_numbers_differ_between_workers_and_epochs(here: Path) -> None:
    (here / "noise_data.py").write_text(OWN_DATA)
    source = load_recipe(runs.tiny(here), [*NET, "data={name: 'noise_data:noise'}"]).data.load()
    order = loaders.Order(8, 4, seed=0)
    seen = []
    for epoch in range(2):
        order.epoch = epoch
        for batch in loaders.training_loader(source, order, 2):
            seen += batch.images[:, 0, 0, 0].tolist()
    assert len(set(seen)) == 16


def test_class_weights_as_options_of_a_loss(here: Path) -> None:
    (here / "weighted.py").write_text(
        "import torch\nfrom torch.nn import functional as F\n\n"
        "def loss(logits, target, tree, *, weights: list[float]):\n"
        "    target = target[:, None].expand(-1, logits.shape[1])\n"
        "    return F.cross_entropy(logits.transpose(1, 2), target, torch.tensor(weights))\n"
    )
    weights = [1.0] * 9 + [3.5]
    run_ = trained(here, f"loss={{name: 'weighted:loss', weights: {weights}}}", "schedule.epochs=1")
    assert load_recipe(run_ / "recipe.yaml").loss.options["weights"] == weights


@pytest.mark.parametrize("average", ["{}", "{decay: 0.5}", "{warmup: true}"])
def test_a_moving_average_that_outlasts_the_run_is_said(here: Path, average: str) -> None:
    recorder = runs.Recorder()
    warned: list[str] = []
    recorder.warned = warned.append
    trained(here, f"ema={average}", "schedule.epochs=2", reporter=recorder)
    # Six steps: 0.9999 ** 6 is nearly 1, 0.5 ** 6 is 2 %.
    assert ["99.9 %" in text and "ema.decay" in text for text in warned] == [True] * (
        average == "{}"
    )


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_an_incomplete_step_weigh_what_they_hold(here: Path, parts: int) -> None:
    options = ("batch_size=98", "schedule.epochs=1")  # 300 images: 98, 98, 98, 6
    whole = trained(here, *options, "name=whole")
    divided = trained(here, *options, f"gradient_accumulation={parts}", "name=divided")
    one, other = runs.weights(whole), runs.weights(divided)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_cut_off_by_a_full_disk_is_passed_over(here: Path) -> None:
    path = trained(here, "checkpoints.minutes=1e-9", "schedule.epochs=1")
    last = (path / "last").resolve()
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recorder = runs.Recorder()
    warned: list[str] = []
    recorder.warned = warned.append
    train(load_recipe(path / "recipe.yaml"), resume=path, reporter=recorder)
    assert any(str(last.name) in text for text in warned)
    assert treeify.load(path / "last", trust=True)


def test_fewer_images_than_a_batch_are_trained_on(here: Path) -> None:
    recorder = runs.Recorder()
    trained(here, "batch_size=1000", "schedule.epochs=2", reporter=recorder)
    assert len(recorder.of(Step)) == 2


def test_labels_that_count_from_one(here: Path) -> None:
    (here / "noise_data.py").write_text(OWN_DATA)
    with pytest.raises(DataError, match=r"0 to 1(.|\n)*Found 2"):
        trained(here, "data={name: 'noise_data:from_one'}", "model.kwargs={num_classes: 2}")


# Messy folders


def folder_data(root: Path, **options: object) -> data.Data:
    return data.SOURCES.find("image_folder")(root=str(root), size=16, **options)


def test_apple_double_files_are_no_images(tmp_path: Path) -> None:
    root = runs.photos(tmp_path / "photos")
    for image in list(root.rglob("*.png")):
        image.with_name(f"._{image.name}").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    photos = folder_data(root)
    assert len(photos.train) == len(photos.held_out) == 16


def test_capital_and_modern_file_endings(tmp_path: Path) -> None:
    root = runs.photos(tmp_path / "photos")
    for part in ("train", "val"):
        image = Image.open(root / part / "dark" / "0.png")
        for name in ("A.JPG", "B.Jpeg", "C.PNG", "d.webp", "E.TIFF"):
            image.save(root / part / "dark" / name)
    assert len(folder_data(root).train) == 21


def test_a_palette_image_with_transparency_is_what_its_rgba_twin_is(tmp_path: Path) -> None:
    root = runs.photos(tmp_path / "photos")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 8, 16))
    palette.save(root / "val" / "dark" / "p.png", transparency=bytes([0, 255]))
    Image.open(root / "val" / "dark" / "p.png").convert("RGBA").save(root / "val/dark/q.png")
    photos = folder_data(root)
    paths = [Path(path).name for path, _ in photos.held_out.examples.samples]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (photos.held_out[paths.index(name)][0] for name in ("p.png", "q.png"))
    torch.testing.assert_close(one, other)
    saved_ensembles.save(tmp_path / "saved")
    files = [str(root / "val/dark" / name) for name in ("p.png", "q.png")]
    answer = json.loads(run("predict", str(tmp_path / "saved"), "--trust", *files, *PREDICT).output)
    assert answer["images"][0]["top"] == answer["images"][1]["top"]


def test_a_class_folder_that_is_a_link(tmp_path: Path) -> None:
    root = runs.photos(tmp_path / "photos")
    (root / "train" / "dark").rename(tmp_path / "elsewhere")
    (root / "train" / "dark").symlink_to(tmp_path / "elsewhere")
    assert len(folder_data(root).train) == 16


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1)])
def test_an_image_of_one_line(tmp_path: Path, size: tuple[int, int]) -> None:
    root = runs.photos(tmp_path / "photos")
    for part in ("train", "val"):
        Image.new("RGB", size, (9, 9, 9)).save(root / part / "dark" / "0.png")
    for options in ({}, {"crop_padding": 2}):
        photos = folder_data(root, **options)
        assert photos.train[0][0].shape == photos.held_out[0][0].shape == (3, 16, 16)
    saved_ensembles.save(tmp_path / "saved")
    answer = run(
        "predict", str(tmp_path / "saved"), "--trust", str(root / "val/dark/0.png"), *PREDICT
    )
    assert answer.exit_code == 0, answer.output


def test_examples_travel_to_workers_that_are_started_anew(tmp_path: Path) -> None:
    root = runs.photos(tmp_path / "photos")
    for options in ({}, {"crop_padding": 2}, {"auto_augment": "rand-m9-mstd0.5"}):
        photos = folder_data(root, **options)
        again = pickle.loads(pickle.dumps(photos))
        torch.testing.assert_close(again.held_out[0][0], photos.held_out[0][0])
    digits = data.SOURCES.find("digits")()
    assert len(pickle.loads(pickle.dumps(digits)).train) == len(digits.train)


def test_the_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("train: images\n")
    with pytest.raises(DataError, match=r"data\.yaml"):
        folder_data(tmp_path / "data.yaml")


def test_one_class_alone(here: Path) -> None:
    root = runs.photos(here / "photos")
    for part in ("train", "val"):
        shutil.rmtree(root / part / "light")
    with pytest.raises(DataError, match=r"one class(.|\n)*dark"):
        trained(
            here,
            "data={name: image_folder, root: photos, size: 16}",
            "model.kwargs={num_classes: 1}",
        )


def test_a_tilde_in_the_root(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.photos(here / "photos")
    monkeypatch.setenv("HOME", str(here))
    recipe = load_recipe(runs.tiny(here), ["data={name: image_folder, root: ~/photos, size: 16}"])
    assert len(recipe.data.load().train) == 16


# First hours


def test_a_learning_rate_without_a_point(here: Path) -> None:
    path = runs.tiny(here)
    path.write_text(path.read_text().replace("lr: 0.05", "lr: 2e-5"))
    assert load_recipe(path).optimizer.lr == 2e-5
    assert load_recipe(path, ["optimizer.lr=3E-4"]).optimizer.lr == 3e-4


def test_a_folder_named_by_a_number(here: Path) -> None:
    runs.photos(here / "2024")
    path = runs.tiny(here)
    text = path.read_text().replace(
        "{name: digits, held_out: 1497}", "{name: image_folder, root: 2024}"
    )
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"data\.root.*line 6(.|\n)*2024"):
        load_recipe(path)
    assert len(load_recipe(path, ["data.root='2024'"]).data.load().train) == 16


def test_a_run_directory_that_cannot_be_made(here: Path) -> None:
    (here / "file").write_text("not a directory")
    answers = [
        run("train", str(runs.tiny(here)), "--out", "file/run"),
        run("convert", "own:net", "--splits", "3", "--input-size", "16", "--out", "file/hne"),
    ]
    for answer in answers:
        assert answer.exit_code == 2
        assert "CheckpointError" in answer.output
        assert "file" in answer.output


def test_another_batch_size_when_going_on(here: Path) -> None:
    path = trained(here, "schedule.epochs=1")
    answer = run("train", str(path / "recipe.yaml"), "batch_size=50", "--resume", str(path))
    assert answer.exit_code == 2
    assert "batch_size: 50, the run has 100" in answer.output


def test_a_table_into_a_file_of_another_encoding(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (here / "table.txt").open("w", encoding="cp1252") as file:
        monkeypatch.setattr(sys, "stdout", file)
        app(["splits", "own:net"], standalone_mode=False)
    assert "MACs" in (here / "table.txt").read_text(encoding="cp1252")


def test_a_table_into_head(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # head has gone
    file = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(SystemExit):
        app(["splits", "own:net"])
    file.close()
    assert "Broken" not in capfd.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:7"])
def test_a_device_that_is_not_there(here: Path, device: str) -> None:
    answer = run("train", str(runs.tiny(here)), f"device={device}")
    assert answer.exit_code == 2
    assert device in answer.output
    assert "cpu" in answer.output
    assert "bug" not in answer.output
    assert not (here / "runs").exists()
