"""How an opened image gets its size and is normalised: to train on it, to evaluate and to predict.

A `Preparation` is plain data. A data set has one, and so does the ensemble that was trained on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from pydantic import TypeAdapter
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import normalize

from treeify.arguments import (
    require_integer,
    require_iterable,
    require_member,
    require_number,
    require_type,
)
from treeify.data.image_files import (
    MODES,
    UnreadableImageError,
    explain,
    open_image,
    to_channels,
    upright,
)
from treeify.errors import DataError, InputError
from treeify.models.image_size import LARGEST, height_and_width

CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Preparation:
    """How opened images become inputs `[C, H, W]` of an ensemble, as timm resizes and crops.

    Args:
        size: height and width in pixels.
        mean: of each channel, pixels in 0 to 1; one number is for all. None if it is not known.
        std: of each channel; None if it is not known.
        channels: 1 for grey, 3 for colour, 4 for colour and opacity.
        crop_mode: `center`: the shorter side is resized, and the centre cropped; `squash`: both
            sides are; `border`: the longer side is, and the mean colour added around.
        crop_pct: the fraction of the resized image's sides that is cropped.
        interpolation: of resizing.
        classes: names of the ensemble's outputs, in their order; None if they are not known.
        source: where all this comes from, one phrase.

    Raises:
        InputError: the numbers do not fit each other.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int = 3
    crop_mode: CropMode = "center"
    crop_pct: float = 1.0
    interpolation: Interpolation = "bilinear"
    classes: tuple[str, ...] | None = None
    source: str = "as the data set says"

    def __post_init__(self) -> None:
        """Check the values; lists become tuples, so that equal ones compare equal."""
        if (self.mean is None) != (self.std is None):
            alone = "mean" if self.std is None else "std"
            raise InputError(
                f"{alone} was given alone.",
                expected="mean and std, or neither",
                next_step="Pass both.",
            )
        height, width = height_and_width(self.size)
        require_integer("channels of images", self.channels, 1, LARGEST)
        require_number(
            "crop_pct", self.crop_pct, above=0, expected="a finite number above 0, such as 0.875"
        )
        for key, values in (("crop_mode", CropMode), ("interpolation", Interpolation)):
            choices = get_args(values)
            require_member(key, getattr(self, key), choices, ", ".join(choices))
        object.__setattr__(self, "size", (height, width))
        if self.mean is not None and self.std is not None:
            object.__setattr__(self, "mean", _per_channel(self.mean, self.channels, "mean"))
            object.__setattr__(self, "std", _per_channel(self.std, self.channels, "std"))
            if min(self.std) <= 0:
                raise InputError(
                    "std divides pixels.", expected="numbers above 0", found=f"{min(self.std):g}"
                )
        if self.classes is not None:
            require_iterable("classes", self.classes, "names of classes, or None")
            object.__setattr__(self, "classes", tuple(map(str, self.classes)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an input, `(C, H, W)`."""
        return (self.channels, *self.size)

    @property
    def is_known(self) -> bool:
        """Whether images can be prepared; else this holds the names of the classes only."""
        return self.mean is not None

    def __str__(self) -> str:
        """Shape, statistics and where they come from, in one line."""
        shape = " x ".join(map(str, self.shape))
        if self.mean is None or self.std is None:
            return f"{shape}, mean and std unknown ({self.source})"
        mean, std = (" ".join(f"{value:g}" for value in part) for part in (self.mean, self.std))
        crop = f", {self.crop_pct:.4g} of the sides kept" if self.crop_pct != 1 else ""
        return f"{shape}, mean {mean}, std {std}{crop} ({self.source})"

    def __call__(self, image: Image.Image) -> Tensor:
        """An image of Pillow's as floats `[C, H, W]`.

        It is turned and scaled to 8 bits as `treeify.data.open_image` does, unless that is done.

        Raises:
            InputError: mean and std are not known, or no file has so many channels.
            ValueError: the range of its pixels is not known.
        """
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """An image in this size and these channels, `[C, H, W]` from 0 to 255.

        Raises:
            InputError: mean and std are not known, or no file has so many channels.
        """
        self.check()
        border = self.mean or ()
        fit = _resizing(self.size, self.crop_mode, self.crop_pct, self.interpolation, border)
        tensor: Tensor = fit(to_channels(upright(image), self.channels))
        return tensor

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels `[..., C, H, W]` from 0 to 255 as floats, by mean and std."""
        tensor: Tensor = normalize(pixels.to(torch.float32).div(255), self.mean, self.std)
        return tensor

    def check(self) -> None:
        """Raise InputError unless files can be prepared so."""
        if self.channels not in MODES:
            raise InputError(
                f"the ensemble takes inputs of shape {self.shape}, not files of images.",
                expected="(C, H, W) with 1, 3 or 4 channels",
                next_step="Load it with treeify.load and call hne.predict(x).",
            )
        if not self.is_known:
            raise InputError(
                f"it is not known how images are prepared for this ensemble ({self.source}).",
                expected="mean and std of the channels, pixels in 0 to 1",
                next_step="On the command line: --mean 0.5 --std 0.25 (--mean 0 --std 1 for pixels"
                " in 0 to 1). For good: the same of treeify convert, or hne.preparation ="
                " treeify.data.Preparation(size=(H, W), mean=..., std=...) before treeify.save, or"
                " treeify.data.Data(..., preparation=...) where you train on data of your own.",
            )

    def with_statistics(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, source: str
    ) -> "Preparation":
        """The same with other statistics, of each channel or of all; None leaves them.

        Raises:
            InputError: one was given alone, or the numbers do not fit the channels.
        """
        if mean is None and std is None:
            return self
        return replace(
            self,
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
            source=source,
        )


# To and from JSON values.
PREPARATION = TypeAdapter(Preparation)


def _per_channel(values: Sequence[float], channels: int, what: str) -> tuple[float, ...]:
    """One number for each channel: a single one is for all, and grey is the mean of colours."""
    require_type(what, values, tuple | list, "numbers, one for all channels or one for each")  # type: ignore[arg-type]
    for value in values:
        require_number(f"a number of {what}", value, expected="a finite number")
    if channels == 1 and len(values) == 3:
        return (sum(values) / 3,)
    if len(values) not in (1, channels):
        numbers = "1 number" if len(values) == 1 else f"{len(values)} numbers"
        raise InputError(
            f"{what} has {numbers}, images have {channels} channels.",
            expected=f"1 finite number or {channels}, e.g. {what} 0.5",
            next_step="Pass one number for all channels, or one for each.",
        )
    return tuple(map(float, values)) * (channels // len(values))


@lru_cache
def _resizing(
    size: tuple[int, int],
    crop_mode: str,
    crop_pct: float,
    interpolation: str,
    border: tuple[float, ...],
) -> Any:
    """From an image to pixels of a size."""
    return create_transform(
        size,
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation=interpolation,
        normalize=False,
        mean=border,
    )


def read_files(files: Sequence[Path], preparation: Preparation) -> Tensor:
    """A batch of images `[N, C, H, W]` from their files.

    Args:
        files: in any format that Pillow decodes, see `open_image`.
        preparation: of each image.

    Raises:
        DataError: files are missing or cannot be decoded; all of them are named.
        InputError: it is not known how images are prepared.
    """
    preparation.check()
    images: list[Tensor] = []
    problems: list[str] = []
    for file in files:
        try:
            images.append(preparation(open_image(file)))
        except UnreadableImageError as error:  # noqa: PERF203 - all of them are to be named
            problems.append(f"{error.path!r}: {explain(error.reason or error)}")
    if problems:
        count = "an image" if len(problems) == 1 else f"{len(problems)} images"
        raise DataError(
            "\n  ".join([f"{count} of {len(files)} cannot be read.", *problems]),
            expected="files in a format that Pillow decodes, 8 or 16 bits per channel",
            next_step="Correct or remove these.",
        )
    return torch.stack(images)
