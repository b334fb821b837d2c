"""The one way to open an image: upright, 8 bits per channel, or an error that names the file."""

from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from treeify import files
from treeify.errors import DataError

# How Pillow names pixels with so many channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_ORIENTATION = 0x0112  # in EXIF; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAY_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp")  # among what Pillow keeps of a file
_OPENED = ("L", "LA", "RGB", "RGBA")
_BITS_PER_SAMPLE = 258  # of TIFF
_SIXTEEN_BITS = ("PNG", "PPM")  # whose pixels of mode I go to 65,535


class UnreadableImageError(DataError):
    """An image file is damaged; `reason` is what reading it said."""

    def __init__(self, path: str, reason: Exception | None = None) -> None:
        if reason is None:  # a loader's worker sent it: with a message that has all this
            super().__init__(path.rpartition(f"{type(self).__name__}: ")[2].strip())
        else:
            super().__init__(
                f"an image cannot be read: {path}",
                found=explain(reason),
                next_step="Replace or remove the file, or set skip_corrupt to pass over so many.",
            )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Loader workers send it to their parent."""
        return type(self), (self.path, self.reason)


def explain(reason: Exception) -> str:
    """What kept a file from being read, without its name if the system says it."""
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return text or type(reason).__name__


def open_image(file: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """Open an image file, for training, evaluation and predictions alike.

    It is turned as its EXIF orientation says. Grey pixels of 16 bits (12 in TIFF) are scaled to 8
    by their whole range, palettes and CMYK become RGB. Transparency stays in the fourth channel,
    which `to_channels` leaves out where it is not asked for.

    Args:
        file: its path, or the open file.
        name: what messages call it; by default the path.

    Returns:
        The decoded image, of mode L, LA, RGB or RGBA.

    Raises:
        UnreadableImageError: it is missing, damaged, far too large, or has floats or integers of
            32 bits, whose range nobody knows.
    """
    try:
        if isinstance(file, str | Path):
            files.check_regular(Path(file))
        with Image.open(file) as opened:
            _check_is_data(opened)
            opened.load()
            image = upright(opened)
            return image.copy() if image is opened else image  # which is closed now
    except Exception as error:  # a damaged file makes decoders raise anything
        raise UnreadableImageError(str(file) if name is None else name, error) from error


def _check_is_data(image: Image.Image) -> None:
    """Raise ValueError for an image that decoding would run: EPS, which goes to Ghostscript."""
    if image.format == "EPS":
        raise ValueError("it is a program for printers, not a picture")


def upright(image: Image.Image) -> Image.Image:
    """A decoded image, turned as it says and of mode L, LA, RGB or RGBA; itself if it is that.

    Raises:
        ValueError: the range of its pixels is not known.
    """
    turn = _turn(image)
    if turn is None and image.mode in _OPENED:
        return image
    image = _eight_bits(image)
    if turn is not None:
        image = image.transpose(turn)
        for key in _SAY_ORIENTATION:
            image.info.pop(key, None)
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Not `ImageOps.exif_transpose`: it also writes the EXIF block again, which fails where other
    # tags in it are damaged.
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged block says nothing of the orientation, and nothing of the pixels
        return None
    return _TURNS.get(orientation)


def _eight_bits(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in _SIXTEEN_BITS):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
        scaled = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    if mode.startswith(("I", "F")):
        kind = "floats" if mode.startswith("F") else "integers of 32 bits"
        raise ValueError(f"pixels are {kind}, whose range is not known: save it with 8 or 16 bits")
    if mode in _OPENED:
        return image
    has_alpha = mode in ("PA", "RGBa", "La") or (mode == "P" and "transparency" in image.info)
    return image.convert("RGBA" if has_alpha else "RGB")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An opened image as grey (1), colour (3), or colour and opacity (4)."""
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def is_visible(path: str) -> bool:
    """Whether no name in a relative path begins with a dot: such files belong to programs."""
    return not any(name.startswith(".") and name != "." for name in path.split("/"))
