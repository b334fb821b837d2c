"""The runtime opens image files bit for bit as `treeify.data` does."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_exports
from numpy.testing import assert_array_equal
from PIL import Image

from treeify.data import Preparation
from treeify.data.image_files import UnreadableImageError, open_image
from treeify.data.preparation import PREPARATION
from treeify.deploy.runtime import Anytime, InputError, _open_image

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.3)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROPS = ("center", "squash", "border")


def _preparation(channels: int = 3, **options: Any) -> Preparation:
    values = {"size": (32, 32), "mean": MEAN[:channels], "std": STD[:channels]} | options
    return Preparation(channels=channels, **values)


def _assert_equal(file: Any, preparation: Preparation) -> None:
    mine = _open_image(file, PREPARATION.dump_python(preparation, mode="json"))
    if hasattr(file, "seek"):
        file.seek(0)
    expected = preparation(open_image(file)).numpy()
    assert mine.dtype == np.float32
    assert mine.flags.c_contiguous
    assert_array_equal(mine, expected)


def _picture(generator: np.random.Generator, height: int, width: int, mode: str) -> Image.Image:
    """Smooth and rough parts in any mode of Pillow's."""
    pixels = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[height // 3 :] = np.linspace(0, 255, width)[None, :, None]
    picture = Image.fromarray(pixels)
    if mode in ("CMYK", "YCbCr", "P", "1"):  # not from RGBA
        picture = picture.convert("RGB")
    return picture.convert(mode)


@pytest.mark.parametrize("crop_mode", CROPS)
@pytest.mark.parametrize("seed", range(20))
def test_sizes_crops_and_interpolations(tmp_path: Path, crop_mode: str, seed: int) -> None:
    choose = random.Random(f"{crop_mode} {seed}")
    generator = np.random.default_rng(seed)
    file = tmp_path / "picture.png"
    for interpolation in INTERPOLATIONS:
        height, width = choose.randint(1, 90), choose.randint(1, 90)
        mode = choose.choice(("L", "LA", "RGB", "RGBA", "P", "1"))
        _picture(generator, height, width, mode).save(file)
        side = choose.randint(1, 48)
        preparation = _preparation(
            choose.choice((1, 3, 4)),
            size=choose.choice(((side, side), (side, choose.randint(1, 48)))),
            crop_mode=crop_mode,
            crop_pct=choose.choice((1.0, 0.875, 0.9, 0.95, 1.1, 0.5)),
            interpolation=interpolation,
        )
        try:
            expected = preparation(open_image(file)).numpy()
        except ValueError:  # a picture of one line, resized to none
            with pytest.raises(InputError, match="cannot be read"):
                _open_image(file, PREPARATION.dump_python(preparation, mode="json"))
        else:
            values = PREPARATION.dump_python(preparation, mode="json")
            assert_array_equal(_open_image(file, values), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGB", "jpeg"),
        ("CMYK", "jpeg"),
        ("L", "jpeg"),
        ("RGBA", "webp"),
        ("RGB", "bmp"),
        ("RGB", "ppm"),
        ("CMYK", "tiff"),
        ("LAB", "tiff"),
        ("RGBA", "tiff"),
        ("YCbCr", "tiff"),
    ],
)
def test_modes_and_formats(tmp_path: Path, mode: str, kind: str, channels: int) -> None:
    file = tmp_path / f"picture.{kind}"
    if mode == "LAB":  # which Pillow does not convert to
        picture = Image.merge("LAB", _picture(np.random.default_rng(3), 41, 57, "RGB").split())
    else:
        picture = _picture(np.random.default_rng(3), 41, 57, mode)
    picture.save(file)
    _assert_equal(file, _preparation(channels))


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("most", [65535, 4095, 255])
def test_sixteen_bits(tmp_path: Path, kind: str, most: int) -> None:
    pixels = np.random.default_rng(0).integers(0, most + 1, (40, 50)).astype(np.uint16)
    file = tmp_path / f"picture.{kind}"
    if kind == "pgm":
        file.write_bytes(b"P5 50 40 %d\n" % max(most, 256) + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(file)
    _assert_equal(file, _preparation(1))
    _assert_equal(file, _preparation(3))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_orientations(tmp_path: Path, orientation: int, mode: str) -> None:
    picture = _picture(np.random.default_rng(1), 30, 60, mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "picture.jpeg"
    picture.save(file, exif=exif)
    _assert_equal(file, _preparation(crop_mode="border"))
    gray = tmp_path / "picture.png"
    picture.convert("P").save(gray, exif=exif)
    _assert_equal(gray, _preparation(size=(20, 33)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as Pillow says
def test_damaged_exif(tmp_path: Path) -> None:
    file = tmp_path / "picture.jpeg"
    _picture(np.random.default_rng(1), 30, 60, "RGB").save(
        file, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff"
    )
    _assert_equal(file, _preparation())


def test_palettes_with_transparency(tmp_path: Path) -> None:
    picture = _picture(np.random.default_rng(1), 30, 60, "RGB").convert("P")
    for transparency in (3, bytes(range(0, 250, 5))):
        file = tmp_path / "picture.png"
        picture.save(file, transparency=transparency)
        for channels in (1, 3, 4):
            _assert_equal(file, _preparation(channels))


def test_open_files(tmp_path: Path) -> None:
    content = io.BytesIO()
    _picture(np.random.default_rng(1), 30, 60, "RGB").save(content, "PNG")
    content.seek(0)
    _assert_equal(content, _preparation())


@pytest.fixture
def model(tmp_path: Path) -> Anytime:
    return Anytime(tiny_exports.write(tmp_path / "tiny").path, threads=1)


def test_a_file_becomes_a_batch_of_one(model: Anytime, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    _picture(np.random.default_rng(1), 30, 60, "RGB").save(file)
    images = model.open(str(file))
    preparation = PREPARATION.validate_python(tiny_exports.PREPARATION)
    assert_array_equal(images, preparation(open_image(file)).numpy()[None])
    assert model.predict(images).shape == (1, 5)


def _files(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("missing.png", "text.png", "cut.png", "folder")}
    files["text.png"].write_text("no picture")
    files["folder"].mkdir()
    whole = io.BytesIO()
    _picture(np.random.default_rng(1), 30, 60, "RGB").save(whole, "PNG")
    files["cut.png"].write_bytes(whole.getvalue()[:200])
    files["floats.tiff"] = tmp_path / "floats.tiff"
    Image.fromarray(np.ones((8, 8), np.float32)).save(files["floats.tiff"])
    files["integers.tiff"] = tmp_path / "integers.tiff"
    Image.fromarray(np.ones((8, 8), np.int32)).save(files["integers.tiff"])
    files["program.eps"] = tmp_path / "program.eps"
    _picture(np.random.default_rng(1), 3, 6, "RGB").save(files["program.eps"])
    return files


def test_files_that_are_no_images(model: Anytime, tmp_path: Path) -> None:
    for name, file in _files(tmp_path).items():
        with pytest.raises(UnreadableImageError):
            open_image(file)
        with pytest.raises(InputError, match=f"an image cannot be read: .*{name}"):
            model.open(file)


def test_what_is_not_known_of_images(tmp_path: Path) -> None:
    nothing = {"mean": None, "std": None}
    for index, preparation in enumerate((None, tiny_exports.PREPARATION | nothing)):
        tiny = tiny_exports.write(tmp_path / f"{index}", preparation=preparation)
        with pytest.raises(InputError, match="it is not known how images are prepared"):
            Anytime(tiny.path, threads=1).open("picture.png")


def test_inputs_that_are_no_images(tmp_path: Path) -> None:
    odd = tiny_exports.PREPARATION | {"channels": 2, "mean": [0.5, 0.5], "std": [0.5, 0.5]}
    tiny = tiny_exports.write(tmp_path / "odd", preparation=odd)
    with pytest.raises(InputError, match=r"inputs of shape \(2, 4, 4\), not files of images"):
        Anytime(tiny.path, threads=1).open("picture.png")
