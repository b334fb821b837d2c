"""Image files with any bytes changed: a picture, or `UnreadableImageError`."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from faults.fuzzing import MANY, assert_readable, edited, edits, fuzzed, limited, outcome
from hypothesis import strategies as st
from PIL import Image

from treeify.data import Preparation
from treeify.data.image_files import UnreadableImageError, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
PREPARATION = Preparation(size=(8, 8), mean=(0.5,), std=(0.5,))
_LARGE = 10**7  # pixels that are not resized here, which says nothing new


def encoded(mode: str, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(PIXELS, "RGBA").convert(mode) if mode != "I;16" else _sixteen_bits()
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _sixteen_bits() -> Image.Image:
    return Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = [
    *(encoded(mode, "PNG") for mode in ("RGB", "RGBA", "P", "L", "1", "I;16")),
    encoded("RGB", "PNG", exif=_exif()),
    encoded("RGB", "JPEG", exif=_exif()),
    *(encoded(mode, "JPEG", progressive=True) for mode in ("L", "CMYK")),
    encoded("P", "GIF"),
    encoded("P", "GIF", save_all=True, append_images=[Image.new("P", (20, 24))]),
    encoded("RGBA", "WEBP"),
    encoded("RGB", "WEBP", lossless=True),
    encoded("RGB", "BMP"),
    *(encoded("RGB", "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg")),
    encoded("I;16", "TIFF"),
    *(encoded("RGB", kind) for kind in ("PPM", "TGA", "PCX", "JPEG2000", "SGI", "DDS", "EPS")),
    encoded("RGBA", "ICO", sizes=[(20, 24)]),
    encoded("1", "XBM"),
]
files = st.tuples(st.sampled_from(PICTURES), edits).map(lambda pair: edited(*pair))


def check(content: bytes) -> None:
    image = outcome(lambda: open_image(io.BytesIO(content), "file"), UnreadableImageError)
    if image is None:
        return
    assert image.mode in ("L", "LA", "RGB", "RGBA")
    if image.width * image.height < _LARGE:
        with limited():
            tensor = PREPARATION(image)
        assert tensor.shape == (3, 8, 8)
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("content", [p for p in PICTURES if not p.startswith(b"%!PS")], ids=len)
def test_the_pictures_are_ones(content: bytes) -> None:
    assert sorted(open_image(io.BytesIO(content)).size) == [20, 24]


def test_a_program_for_printers_is_not_run() -> None:
    with pytest.raises(UnreadableImageError, match="program for printers") as caught:
        open_image(io.BytesIO(encoded("RGB", "EPS")), "a.eps")
    assert_readable(str(caught.value))


@fuzzed(250, content=files)
def test_a_picture_with_any_bytes_changed(content: bytes) -> None:
    check(content)


@fuzzed(MANY, content=files)
def test_ten_thousand_pictures(content: bytes) -> None:
    check(content)
