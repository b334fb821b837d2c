"""Image files as the batch an ensemble was trained to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from PIL import Image, ImageOps
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import v2

from treeify import data
from treeify.cli.saved import recipe_of
from treeify.errors import DataError, InputError
from treeify.models.architecture import Architecture
from treeify.models.builders import TIMM, TORCHVISION
from treeify.training.recipe_file import load_recipe

# How Pillow names pixels with so many channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Geometry = Callable[[Any], Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Preparation:
    """How files become images `[C, H, W]`.

    Args:
        shape: of the images.
        geometry: from a decoded image to pixels of that height and width.
        mean: of each channel, pixels in 0 to 1.
        std: of each channel.
        source: where these come from, one phrase.
    """

    shape: Shape
    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __str__(self) -> str:
        """One line."""
        shape = " x ".join(map(str, self.shape))
        mean, std = (" ".join(f"{value:g}" for value in own) for own in (self.mean, self.std))
        return f"{shape}, mean {mean}, std {std} ({self.source})"

    def __call__(self, image: Image.Image) -> Tensor:
        """A decoded image as floats `[C, H, W]`."""
        pixels = self.geometry(image.convert(_MODES[self.shape[0]]))
        scaled = v2.functional.to_dtype(v2.functional.to_image(pixels), torch.float32, scale=True)
        normalised = v2.functional.normalize(scaled, list(self.mean), list(self.std))
        return normalised.as_subclass(Tensor)  # type: ignore[no-any-return]


def read(files: Sequence[Path], preparation: Preparation) -> Tensor:
    """A batch of image files, `[N, C, H, W]`.

    Args:
        files: in any format that Pillow decodes; turned as their EXIF orientation says.
        preparation: what is done with each.

    Raises:
        DataError: files are missing or cannot be decoded; all of them are named.
    """
    found = [_try(preparation, file) for file in files]
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems:
        count = "an image" if len(problems) == 1 else f"{len(problems)} images"
        raise DataError(
            "\n  ".join([f"{count} of {len(files)} cannot be read.", *problems]),
            expected="files in a format that Pillow decodes, 8 bits per channel",
            next_step="Nothing was computed. Correct or remove these.",
        )
    return torch.stack([image for image in found if not isinstance(image, str)])


def _try(preparation: Preparation, file: Path) -> Tensor | str:
    """The image, or why there is none."""
    try:
        return preparation(_decode(file))
    except Exception as error:  # a damaged file makes decoders raise all kinds of things
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return f"{str(file)!r}: {reason}"


def _decode(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per channel, which would be cut off")
        image = ImageOps.exif_transpose(opened)
        image.load()
        return image


def preparation(
    path: Path,
    config: Mapping[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preparation:
    """What a checkpoint's images go through, as far as it is known.

    In this order: the held-out images' way in the recipe of the run that wrote it, what timm or
    torchvision note for the architecture's trained weights, and pixels in 0 to 1.

    Args:
        path: the checkpoint.
        config: its configuration.
        mean: of each channel, or of all, instead of the known one.
        std: likewise; given together with the mean.

    Raises:
        InputError: the ensemble takes no images, or the numbers do not fit its channels.
    """
    shape: Shape = tuple(config["example"])
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InputError(
            f"{path} takes inputs of shape {shape}, not files of images.",
            expected="(C, H, W) with 1, 3 or 4 channels",
            next_step="Load it with treeify.load and call hne.predict(x).",
        )
    if (mean is None) != (std is None):
        raise InputError(
            f"{'--mean' if std is None else '--std'} was given alone.", expected="both or neither"
        )
    named = config["architecture"] and Architecture.from_dict(config["architecture"])
    found = (
        _of_recipe(path, shape)
        or (named and (_of_torchvision(named, shape) or _of_timm(named, shape)))
        or Preparation(shape, _fit(shape), (0.0,), (1.0,), "pixels in 0 to 1: --mean, --std")
    )
    source = found.source if mean is None else "--mean and --std"
    return Preparation(
        shape,
        found.geometry,
        _per_channel(found.mean if mean is None else mean, shape[0], "--mean"),
        _per_channel(found.std if std is None else std, shape[0], "--std"),
        source,
    )


def _per_channel(values: Sequence[float], channels: int, option: str) -> tuple[float, ...]:
    """One number for each channel: a single one is for all, grey images have the colours' mean."""
    if channels == 1 and len(values) == 3:
        return (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise InputError(
            f"{option} has {len(values)} numbers, images have {channels} channels.",
            expected=f"1 number or {channels}, e.g. {option} 0.5",
        )
    return tuple(values) * (channels // len(values))


def _of_recipe(path: Path, shape: Shape) -> Preparation | None:
    recipe = recipe_of(path)
    section = load_recipe(recipe).data if recipe else None
    if section is None or section.name not in (*_HELD_OUT, *_PHOTOGRAPHS):
        return None
    source = f"held-out images of {section.name}, from the run's recipe"
    if section.name in _PHOTOGRAPHS and section.options.get("crop_padding") is None:
        return _by_timm(data.preparation(section.options["like"]), shape, source)
    statistics, geometry = _HELD_OUT[section.name]
    mean, std = map(tuple, statistics)
    return Preparation(shape, geometry(shape), mean, std, source)


def _by_timm(config: Mapping[str, Any], shape: Shape, source: str) -> Preparation:
    """What `timm.data.create_transform` makes of a configuration."""
    options: dict[str, Any] = {"input_size": shape, **config}
    geometry = create_transform(**options, normalize=False)
    return Preparation(shape, geometry, config["mean"], config["std"], source)


def _of_timm(architecture: Architecture, shape: Shape) -> Preparation | None:
    name = architecture.name.removeprefix(TIMM)
    known = None if ":" in name else timm.get_pretrained_cfg(name)
    if known is None:
        return None
    noted = asdict(known)
    config = resolve_data_config({"input_size": shape}, pretrained_cfg=noted)  # type: ignore[no-untyped-call]
    return _by_timm(config, shape, f"timm's for {name}")


def _of_torchvision(architecture: Architecture, shape: Shape) -> Preparation | None:
    if ":" in architecture.name or not architecture.name.startswith(TORCHVISION):
        return None
    weights = torchvision.models.get_model_weights(architecture.name.removeprefix(TORCHVISION))
    usual = weights.DEFAULT.transforms()
    share = usual.resize_size[0] / usual.crop_size[0]
    resize = v2.Resize(round(max(shape[1:]) * share), interpolation=usual.interpolation)
    geometry = v2.Compose([resize, v2.CenterCrop(list(shape[1:]))])
    source = f"torchvision's for {architecture.name}"
    return Preparation(shape, geometry, tuple(usual.mean), tuple(usual.std), source)


def _fit(shape: Shape) -> Geometry:
    """Scaled until height and width are covered, the middle kept."""

    def cover(image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        scale = max(shape[1] / height, shape[2] / width)
        size = [max(shape[1], round(height * scale)), max(shape[2], round(width * scale))]
        return v2.functional.center_crop(v2.functional.resize(image, size), list(shape[1:]))

    return cover


def _stretch(shape: Shape) -> Geometry:
    both: Geometry = v2.Compose([v2.ToImage(), v2.Resize(list(shape[1:]), antialias=True)])
    return both


# What `treeify.data` does to held-out images: their statistics, and how they get their size.
_HELD_OUT: dict[str, tuple[data.Statistics, Callable[[Shape], Geometry]]] = {
    "digits": (data.DIGITS, _stretch),
    "cifar10": (data.CIFAR10, _fit),
    "cifar100": (data.CIFAR100, _fit),
    "fashion_mnist": (data.FASHION_MNIST, _fit),
    "image_folder": (data.IMAGENET, _stretch),
}
# Those that timm prepares, `image_folder` without `crop_padding`.
_PHOTOGRAPHS = ("image_folder", "timm", "webdataset")
