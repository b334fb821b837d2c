"""Folders and image files as people have them."""

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from edited import edited
from pictures import images_of, labels_of
from PIL import Image, ImageOps
from runner import run

import treeify
from treeify import data
from treeify.data.conventions import of_data_set
from treeify.data.data_set import Data
from treeify.data.preparation import read_files
from treeify.errors import CheckpointError, DataError, InputError, RecipeError
from treeify.training.model import as_saved
from treeify.training.objective import load_teacher
from treeify.training.recipe import TeacherRecipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

RECIPE = """\
name: photos
model: {name: "small:build", kwargs: {classes: 2}, splits: [stage1, stage2]}
data: {name: image_folder, root: photos, size: 8, crop_padding: 0}
loss: {name: independent}
optimizer: {lr: 0.01}
schedule: {epochs: 1}
batch_size: 8
device: cpu
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, and beside it folders of 8 dark and 8 light photos to train on and held out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    runs.photos(tmp_path / "photos")
    (tmp_path / "photos.yaml").write_text(RECIPE)
    return tmp_path / "photos.yaml"


def trained(recipe: Path, *overrides: str, out: str = "run") -> Path:
    """The directory of a run."""
    return train(load_recipe(recipe, overrides), out=out).run.directory


def folder(root: Path, **images: Image.Image) -> data.Data:
    """A data set of one class per image, the same to train on and held out."""
    for part in ("train", "val"):
        for name, image in images.items():
            (root / part / name).mkdir(parents=True)
            suffix = "tif" if image.mode == "F" else "png"
            image.save(root / part / name / f"1.{suffix}", exif=image.getexif())
    return data.image_folder(root=str(root), size=16, crop_padding=0, flip=False)


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# D2: 16 bits


@pytest.mark.parametrize("name", ["image_folder", "timm"])
def test_16_bit_pngs_are_trained_on_as_what_they_show(tmp_path: Path, name: str) -> None:
    grey = noise("L", (16, 16))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    plain, scaled = folder(tmp_path / "plain", a=grey), folder(tmp_path / "deep", a=deep)
    if name == "timm":
        options = {"held_out_split": "val", "size": 16, "flip": False}
        plain, scaled = (
            data.timm_dataset(root=str(tmp_path / part), **options) for part in ("plain", "deep")
        )
    assert torch.equal(images_of(scaled.held_out), images_of(plain.held_out))
    assert scaled.held_out[0][0].std() > 0.1
    torch.manual_seed(0)
    one = plain.train[0][0]
    torch.manual_seed(0)
    if name == "image_folder":
        assert torch.equal(scaled.train[0][0], one)
    files = [tmp_path / part / "val" / "a" / "1.png" for part in ("plain", "deep")]
    assert plain.preparation is not None
    assert torch.equal(*read_files(files, plain.preparation))


@pytest.mark.parametrize("kind", ["tiff", "big-endian tiff", "12-bit tiff", "pgm"])
def test_other_files_of_more_than_8_bits_are_scaled_by_their_whole_range(
    tmp_path: Path, kind: str
) -> None:
    grey = np.asarray(noise("L", (16, 16)))
    deep = grey.astype(np.uint16) * 257
    file = tmp_path / "deep"
    if kind == "pgm":
        file.write_bytes(b"P5 16 16 65535\n" + deep.astype(">u2").tobytes())
    elif kind == "tiff":
        Image.fromarray(deep).save(file, "tiff")
    else:
        file.write_bytes(tiff(grey, 12 if kind.startswith("12") else 16))
    assert np.abs(np.asarray(data.open_image(file)).astype(int) - grey).max() <= 1


def tiff(grey: np.ndarray, bits: int) -> bytes:
    """A TIFF of 16 bits, most significant byte first, or of 12 bits, packed."""
    height, width = grey.shape
    scaled = (grey.astype(np.uint32) * (2**bits - 1) + 127) // 255
    order, mark = (">", b"MM") if bits == 16 else ("<", b"II")
    if bits == 16:
        pixels = scaled.astype(">u2").tobytes()
    else:
        first, second = scaled.reshape(-1, 2).T
        pixels = (
            np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
            .astype(np.uint8)
            .tobytes()
        )
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height}
    tags |= {273: 8, 279: len(pixels)}
    entries = b"".join(
        struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    directory = struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)
    return mark + struct.pack(order + "HI", 42, 8 + len(pixels)) + pixels + directory


def test_an_image_of_pillows_is_scaled_too(tmp_path: Path) -> None:
    grey = noise("L", (16, 16))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    prepare = data.Preparation(size=(16, 16), mean=(0.5,), std=(0.5,), channels=1)
    assert torch.equal(prepare(deep), prepare(grey))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_whose_range_nobody_knows_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8), 1000).save(tmp_path / "deep.tif")
    with pytest.raises(
        data.UnreadableImageError, match=r"(?s)cannot be read: .*deep.*range is not"
    ):
        data.open_image(tmp_path / "deep.tif")


def test_palettes_opacity_cmyk_and_one_bit_are_read(tmp_path: Path) -> None:
    for mode in ("P", "LA", "RGBA", "1", "CMYK", "YCbCr"):
        file = tmp_path / f"{mode}.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
        noise(mode).save(file)
        for channels in (1, 3, 4):
            prepare = data.Preparation(size=(8, 8), mean=[0.5], std=[0.5], channels=channels)
            assert prepare(data.open_image(file)).shape == (channels, 8, 8)
    see_through = noise("P")
    see_through.save(tmp_path / "seen.png", transparency=bytes(range(256)))
    assert data.open_image(tmp_path / "seen.png").mode == "RGBA"
    expected = see_through.convert("RGB")
    assert data.open_image(tmp_path / "seen.png").convert("RGB").tobytes() == expected.tobytes()


# D3: orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_in_training_as_in_predictions(tmp_path: Path, orientation: int) -> None:
    photo = noise()
    photo.getexif()[0x0112] = orientation
    photos = folder(tmp_path, a=photo)
    upright = ImageOps.exif_transpose(photo)
    assert photos.preparation is not None
    expected = photos.preparation(upright)
    assert torch.equal(photos.held_out[0][0], expected)
    assert torch.equal(photos.train[0][0], expected)
    file = tmp_path / "val" / "a" / "1.png"
    assert torch.equal(read_files([file], photos.preparation)[0], expected)
    with Image.open(file) as opened:
        assert torch.equal(photos.preparation(opened), expected)
    assert torch.equal(photos.preparation(data.open_image(file)), expected)
    photo.save(tmp_path / "photo.tif", exif=photo.getexif())
    assert torch.equal(photos.preparation(data.open_image(tmp_path / "photo.tif")), expected)
    if orientation == 6:
        by_timm = data.timm_dataset(root=str(tmp_path), held_out_split="val", size=16)
        assert by_timm.preparation is not None
        assert torch.equal(by_timm.held_out[0][0], by_timm.preparation(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's
def test_a_damaged_exif_block_spoils_no_photo(tmp_path: Path) -> None:
    noise().save(
        tmp_path / "1.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x99"
    )
    with Image.open(tmp_path / "1.jpg") as plain:
        assert data.open_image(tmp_path / "1.jpg").tobytes() == plain.tobytes()


# D4: whatever decoders raise


def bad_pngs(directory: Path) -> list[Path]:
    """An image with an oversized text chunk, one with a broken header, and one cut off."""
    noise().save(directory / "plain.png")
    whole = (directory / "plain.png").read_bytes()
    (directory / "plain.png").unlink()
    text = b"key\0\0" + zlib.compress(b"0" * 2**24, 9)
    chunk = b"zTXt" + text
    chunk = struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    contents = {
        "text.png": whole[:33] + chunk + whole[33:],
        "header.png": whole[:16] + b"\0" * 4,
        "cut.png": whole[: len(whole) // 2],
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in contents]


def test_files_that_break_decoders_are_named_and_counted(recipe: Path) -> None:
    files = bad_pngs(Path("photos/train/dark"))
    for file in files:
        with pytest.raises(data.UnreadableImageError, match=f"cannot be read: {file}"):
            data.open_image(file)
    result = train(load_recipe(recipe, ["skip_corrupt=3"]), out="run")
    assert result.last is not None
    assert result.last.skipped == 3
    shown = run("train", str(recipe), "--out", "other")
    assert shown.exit_code == 2
    assert "This is a bug" not in shown.output


def test_a_picture_of_190_megapixels_is_named_and_counted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 40)).save("photos/val/dark/huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # of 16 x 16 there are 256
    result = train(load_recipe(recipe, ["skip_corrupt=1"]), out="run")
    assert result.last is not None
    assert result.last.skipped == 1
    shown = run("predict", "run", "--trust", "photos/val/dark/huge.png")
    assert "huge.png': Image size (1600 pixels) exceeds limit" in shown.output


# D6, D7: classes by folders


def test_a_class_without_held_out_images_is_said(recipe: Path) -> None:
    for file in Path("photos/val/light").iterdir():
        file.unlink()
    trained(recipe)
    shown = run("eval", "run", "--trust", "--no-latency")
    assert shown.exit_code == 0, shown.output
    assert "none of 'light'" in shown.output
    Path("photos/val/light").rmdir()
    assert "none of 'light'" in run("eval", "run", "--trust", "--no-latency").output


def test_a_class_without_training_images_is_named_once() -> None:
    with pytest.raises(DataError) as caught:
        data.image_folder(root="nowhere")
    assert f"{Path.cwd() / 'nowhere'}" in str(caught.value)
    assert "Found no such directory" in str(caught.value)


def test_names_that_begin_with_a_dot_are_no_classes_and_no_images(recipe: Path) -> None:
    plain = Path("photos/train/dark/0.png").read_bytes()
    for place in (".ipynb_checkpoints", "dark/.ipynb_checkpoints"):
        Path("photos/train", place).mkdir()
        Path("photos/train", place, "0-checkpoint.png").write_bytes(plain)
    Path("photos/train/light/._1.png").write_bytes(b"a Mac was here")
    Path("photos/train/.DS_Store").write_bytes(b"")
    for options in ({"name": "image_folder"}, {"name": "timm", "held_out_split": "val"}):
        values = [f"data.{key}={value}" for key, value in options.items()]
        photos = load_recipe(recipe, [*values, "data.root=photos"]).data.load()
        assert photos.classes == ("dark", "light")
        assert labels_of(photos.train) == [0] * 8 + [1] * 8


def test_a_message_about_the_number_of_classes_lists_them(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="the data's 2 classes: 'dark', 'light'"):
        train(load_recipe(recipe, ["model.kwargs.classes=3"]), out="run")


# D8: classes by name


def eval_scores(*arguments: str) -> dict[str, Any]:
    result = run("eval", *arguments, "--trust", "--no-latency", "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def other_photos(names: dict[str, str]) -> None:
    """The photos in `other`, with folders renamed."""
    runs.photos(Path("other"))
    for part in ("train", "val"):
        for old, new in names.items():
            Path("other", part, old).rename(Path("other", part, f"new {new}"))
        for new in names.values():
            Path("other", part, f"new {new}").rename(Path("other", part, new))


def test_evaluation_on_other_folders_goes_by_the_classes_names(recipe: Path) -> None:
    trained(recipe, "schedule.epochs=3", "optimizer.lr=0.05")
    expected = eval_scores("run")["scores"]
    other_photos({"dark": "light", "light": "dark"})
    swapped = eval_scores("run", "--data", "root=other")["scores"]
    assert swapped[-1]["accuracy"] == pytest.approx(100 - expected[-1]["accuracy"])
    Path("other/val/dark").rename("elsewhere")
    Path("other/train/dark").rename("elsewhere too")
    assert "none of 'dark'" in eval_scores("run", "--data", "root=other")["split"]
    Path("other/train/light").rename("other/train/bright")
    Path("other/val/light").rename("other/val/bright")
    refused = run("eval", "run", "--trust", "--data", "root=other", "--no-latency")
    assert refused.exit_code == 2
    assert "classes that the ensemble does not know: 'bright'" in refused.output


def test_timm_and_image_folder_number_classes_alike(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("2", "10"):
            (tmp_path / part / name).mkdir(parents=True)
            noise().save(tmp_path / part / name / "1.png")
    folders = data.image_folder(root=str(tmp_path))
    by_timm = data.timm_dataset(root=str(tmp_path), held_out_split="val")
    assert folders.classes == by_timm.classes == ("10", "2")
    assert folders.preparation == data.Preparation(
        **{**vars(by_timm.preparation), "source": folders.preparation.source}
    )
    names = [Path(path).parent.name for path, _ in by_timm.held_out.examples.reader.samples]
    assert [by_timm.classes[label] for label in labels_of(by_timm.held_out)] == names


def test_a_run_of_an_earlier_version_keeps_the_numbers_that_timm_gave(recipe: Path) -> None:
    other_photos({"dark": "2", "light": "10"})
    values = ["data.name=timm", "data.root=other", "data.held_out_split=val", "data.size=8"]
    run_directory = trained(recipe, *values)
    section = load_recipe(recipe, values).data
    hne = treeify.load(run_directory / "last", trust=True)
    assert hne.preparation.classes == ("10", "2")
    assert labels_of(as_saved(hne, section, section.load()).held_out) == [1] * 8 + [0] * 8
    hne.preparation = None  # as the earlier version saved it
    images = as_saved(hne, section, section.load())
    assert images.classes == images.preparation.classes == ("2", "10")
    assert labels_of(images.held_out) == [0] * 8 + [1] * 8
    hne.preparation = images.preparation  # which went on since
    assert as_saved(hne, section, section.load()).classes == ("2", "10")
    treeify.save(hne, run_directory / "last", overwrite=True)
    assert eval_scores(str(run_directory))["scores"]
    of_folders = load_recipe(recipe).data
    assert of_folders.classes_of_earlier_runs(("10", "2")) == ("10", "2")


def test_a_class_renamed_before_a_run_goes_on_is_refused(recipe: Path) -> None:
    trained(recipe)
    for part in ("train", "val"):
        Path("photos", part, "dark").rename(Path("photos", part, "shady"))
    with pytest.raises(CheckpointError, match=r"(?s)0: 'light', the run has 'dark'.*1: 'shady'"):
        train(load_recipe("run/recipe.yaml"), resume="run")


def test_predict_shows_the_names_of_the_classes(recipe: Path) -> None:
    trained(recipe, "ema={decay: 0.9}")
    shown = run("predict", "run", "--trust", "photos/val/dark/0.png")
    assert shown.exit_code == 0, shown.output
    assert "dark" in shown.output
    assert "light" in shown.output
    assert "light" in run("predict", "run/last/ema", "--trust", "photos/val/light/0.png").output
    assert treeify.load("run/last", trust=True).sub_ensemble(1).preparation.classes == (
        "dark",
        "light",
    )


def test_a_teacher_answers_in_the_order_of_the_datas_classes(recipe: Path) -> None:
    trained(recipe)
    hne = treeify.load("run/last", trust=True)
    teacher = {"dtype": torch.float32, "device": torch.device("cpu")}
    load = partial(load_teacher, TeacherRecipe(name="run", trust=True), **teacher)
    x = hne.example_images(2)
    assert torch.equal(load(classes=("light", "dark"))(x), load()(x).flip(1))
    with pytest.raises(RecipeError, match="the teacher knows other classes"):
        load(classes=("light", "shady"))


# D9, N9: channels, sizes and statistics


@pytest.mark.parametrize("name", ["image_folder", "timm"])
def test_images_have_as_many_channels_as_the_model_takes(recipe: Path, name: str) -> None:
    values = {
        "image_folder": ["data.size=8"],
        "timm": ["data.name=timm", "data.root=photos", "data.held_out_split=val", "data.size=8"],
    }
    trained(recipe, "model.kwargs.channels=1", *values[name])
    hne = treeify.load("run/last", trust=True)
    assert hne.preparation.shape == hne.example == (1, 8, 8)
    assert eval_scores("run")["scores"]
    assert run("predict", "run", "--trust", "photos/val/dark/0.png").exit_code == 0


def test_a_model_of_other_channels_is_refused_with_keys_that_train_has(
    recipe: Path, mine: str
) -> None:
    with pytest.raises(RecipeError, match=r"data\.channels .* model\.kwargs\.in_chans=3"):
        trained(recipe, mine, "model.kwargs.channels=1")
    with pytest.raises(RecipeError, match=r"the data's images, of shape \(3, 8, 8\)"):
        trained(recipe, "data.channels=3", "model.kwargs.channels=1")


def test_grey_images_take_timms_policies(recipe: Path) -> None:
    options = ["data.crop_padding=null", "data.auto_augment=rand-m9-mstd0.5", "data.channels=1"]
    photos = load_recipe(recipe, options).data.load()
    assert photos.train[0][0].shape == photos.held_out[0][0].shape == (1, 8, 8)


def test_sizes_need_not_be_square_and_statistics_are_the_users(recipe: Path) -> None:
    values = ["data.size=[8, 12]", "data.mean=[0.5]", "data.std=[0.25, 0.25, 0.5]"]
    for padding in ("0", "null", "2"):
        photos = load_recipe(recipe, [*values, f"data.crop_padding={padding}"]).data.load()
        assert photos.train[0][0].shape == photos.held_out[0][0].shape == (3, 8, 12)
        assert photos.preparation.mean == (0.5, 0.5, 0.5)
        assert photos.held_out[0][0][0].min() == -2
    with pytest.raises(InputError, match="mean was given alone"):
        load_recipe(recipe, ["data.mean=[0.5]"]).data.load()
    with pytest.raises(RecipeError, match=r"data\.size"):
        load_recipe(recipe, ["data.size=[8, 12, 3]"])


def test_a_model_is_converted_for_images_that_are_not_square(recipe: Path) -> None:
    arguments = ("torchvision/squeezenet1_1", "--splits", "1", "--input-size", "64x96")
    shown = run("convert", *arguments, "--num-classes", "3", "--out", "wide", "--no-verify")
    assert shown.exit_code == 0, shown.output
    hne = treeify.load("wide", trust=True)
    assert hne.example == hne.preparation.shape == (3, 64, 96)
    assert "torchvision's for torchvision/squeezenet1_1" in hne.preparation.source
    shown = run(
        "predict", "wide", "--trust", "photos/val/dark/0.png", "--input-size", "96x64", "--json"
    )
    assert json.loads(shown.stdout)["input"] == [3, 96, 64]


# D11


def test_a_byte_order_mark_is_no_part_of_the_first_class(recipe: Path) -> None:
    trained(recipe)
    Path("names.txt").write_bytes("night\nday\n".encode("utf-8-sig"))
    arguments = ("photos/val/dark/0.png", "--labels", "names.txt", "--json")
    (image,) = json.loads(run("predict", "run", "--trust", *arguments).stdout)["images"]
    assert {row["label"] for row in image["top"]} == {"night", "day"}
    Path("map.txt").write_bytes("light\ndark\n".encode("utf-8-sig"))
    mapped = data.timm_dataset(root="photos", held_out_split="val", class_map="map.txt")
    assert mapped.classes == ("light", "dark")
    assert labels_of(mapped.held_out) == [1] * 8 + [0] * 8


# N1: one preparation


def held_out_images(monkeypatch: pytest.MonkeyPatch, module: str) -> list[Any]:
    """The held-out examples that a command's loader is given."""
    seen: list[Any] = []
    loader = sys.modules[module].held_out_loader

    def noting(examples: Any, *args: Any, **options: Any) -> Any:
        seen.append(examples)
        return loader(examples, *args, **options)

    monkeypatch.setattr(f"{module}.held_out_loader", noting)
    return seen


@pytest.mark.parametrize("padding", ["0", "null"])
def test_train_eval_calibrate_and_predict_see_the_same_bits(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, padding: str
) -> None:
    noise(size=(23, 17)).save("photos/val/dark/0.png")
    result = train(load_recipe(recipe, [f"data.crop_padding={padding}"]), out="run")
    image = result.run.data.held_out[0][0]
    run("eval", "--help")
    run("calibrate", "--help")
    in_eval = held_out_images(monkeypatch, "treeify.cli.eval")
    in_calibrate = held_out_images(monkeypatch, "treeify.cli.calibrate")
    eval_scores("run")
    hne = treeify.load("run/last", trust=True)
    target = ("--target-macs", str(hne.count_macs(1)), "--no-tune", "--repeats", "10")
    assert run("calibrate", "run", "--trust", *target).exit_code == 0
    for examples in (*in_eval, *in_calibrate):
        assert torch.equal(examples[0][0], image)
    assert len(in_eval) == len(in_calibrate) == 1
    file = Path("photos/val/dark/0.png")
    assert torch.equal(hne.preparation(data.open_image(file)), image)
    assert torch.equal(read_files([file], hne.preparation)[0], image)
    answer = json.loads(run("predict", "run", "--trust", str(file), "--json").stdout)
    assert answer["mean"] == list(hne.preparation.mean)


def test_an_ensemble_evaluates_other_folders_as_it_predicts(recipe: Path) -> None:
    trained(recipe)
    treeify.save(treeify.load("run/last", trust=True), "alone")
    arguments = ("--data", "name=image_folder", "--data", "root=photos")
    assert eval_scores("alone", *arguments)["scores"] == eval_scores("run")["scores"]
    shown = run("eval", "alone", "--trust", *arguments, "--data", "size=16", "--no-latency")
    assert "Images: 3 x 16 x 16" in shown.output
    hne = treeify.load("alone", trust=True)
    hne.preparation = None
    treeify.save(hne, "unknown")
    shown = run("eval", "unknown", "--trust", *arguments, "--data", "like=resnet18", "--no-latency")
    assert "Images: 3 x 8 x 8, mean 0.485" in shown.output  # the size is its own in any case
    assert "Classes go by their numbers" in shown.output


def test_what_is_no_preparation_is_not_saved(recipe: Path) -> None:
    hne = treeify.load(trained(recipe) / "last", trust=True)
    hne.preparation = data.open_image
    with pytest.raises(CheckpointError, match=r"expected a treeify\.data\.Preparation|plain data"):
        treeify.save(hne, "alone")
    assert not Path("alone").exists()


MINE = """\
import torch
from edited import edited
from treeify.data import Data, Preparation

def mine(*, says: bool = False):
    pixels = torch.linspace(0, 1, 20)[:, None, None, None].expand(-1, 3, 8, 8)
    examples = [((image - 0.5) / 0.25, int(image[0, 0, 0] > 0.5)) for image in pixels]
    preparation = Preparation(size=(8, 8), mean=(0.5,), std=(0.25,)) if says else None
    return Data(examples, examples, ("dark", "light"), "all of them", preparation)
"""


@pytest.fixture
def mine(recipe: Path) -> Iterator[str]:
    """The name of a user's own data set."""
    Path("mine_of_cases.py").write_text(MINE)
    yield "data={name: 'mine_of_cases:mine'}"
    sys.modules.pop("mine_of_cases", None)


def test_predict_refuses_to_guess_how_a_data_set_of_ones_own_was_prepared(
    recipe: Path, mine: str
) -> None:
    trained(recipe, mine)
    refused = run("predict", "run", "--trust", "photos/val/dark/0.png")
    assert refused.exit_code == 2
    for part in ("--mean 0.5 --std 0.25", "hne.preparation =", "preparation=..."):
        assert part in refused.output
    shown = run(
        "predict", "run", "--trust", "photos/val/dark/0.png", "--mean", "0.5", "--std", "0.25"
    )
    assert shown.exit_code == 0, shown.output
    assert "light" in shown.output  # the classes' names are known all the same
    assert eval_scores("run")["scores"]


def test_a_data_set_of_ones_own_says_how_it_prepared_images(recipe: Path, mine: str) -> None:
    trained(recipe, mine, "data.says=true")
    answer = json.loads(run("predict", "run", "--trust", "photos/val/dark/0.png", "--json").stdout)
    assert (answer["mean"], answer["std"]) == ([0.5] * 3, [0.25] * 3)
    hne = treeify.load("run/last", trust=True)
    assert hne.preparation.classes == ("dark", "light")
    hne.preparation = None
    treeify.save(hne, "unknown")
    assert run("predict", "unknown", "--trust", "photos/val/dark/0.png").exit_code == 2


def test_a_preparation_that_does_not_fit_the_data_is_refused(recipe: Path, mine: str) -> None:
    Path("mine_of_cases.py").write_text(MINE.replace("size=(8, 8)", "size=(8, 9)"))
    with pytest.raises(DataError, match=r"shape \(3, 8, 9\)"):
        trained(recipe, mine, "data.says=true")
    preparation = data.Preparation(size=(8, 8), classes=("a", "b"))
    with pytest.raises(DataError, match="different classes"):
        Data([], [], ("b", "a"), "none", preparation)


def test_a_damaged_preparation_is_named(recipe: Path) -> None:
    run_directory = trained(recipe)
    with edited(run_directory / "last" / "config.json") as values:
        values["preparation"]["std"] = [0, 0, 0]
    with pytest.raises(CheckpointError, match="preparation of images is damaged"):
        treeify.load(run_directory / "last", trust=True)


def test_a_run_of_an_earlier_version_is_prepared_as_its_recipe_says(recipe: Path) -> None:
    for padding in ("0", "null"):
        section = load_recipe(recipe, [f"data.crop_padding={padding}"]).data
        photos = section.load()
        preparation = of_data_set(section.name, section.options, (3, 8, 8))
        image = data.open_image("photos/val/dark/0.png")
        assert torch.equal(preparation(image), photos.held_out[0][0])


# N12: where the data are


def test_a_run_finds_its_data_from_anywhere(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = trained(recipe).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert eval_scores(str(directory))["scores"]
    shown = run("eval", str(directory), "--trust", "--data", "root=tiny")
    assert f"no images to be found in '{tmp_path / 'elsewhere' / 'tiny'}'" in shown.output


def test_a_run_of_an_earlier_version_goes_on_from_where_it_began(recipe: Path) -> None:
    trained(recipe, "schedule.epochs=1")
    file = Path("run/recipe.yaml")
    file.write_text(file.read_text().replace(str(Path.cwd() / "photos"), "photos"))
    assert not train(load_recipe(recipe), resume="run").interrupted
