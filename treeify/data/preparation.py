"""How an image is opened, sized and normalised: to train on it, to evaluate and to predict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision import models
from torchvision.transforms import v2

from treeify.errors import DataError, InputError
from treeify.models.architecture import Architecture
from treeify.models.builders import TIMM, TORCHVISION

Transform = Callable[[Any], Any]
Statistics = tuple[Sequence[float], Sequence[float]]
Shape = tuple[int, ...]

# Mean and standard deviation of the training images' channels, pixels in [0, 1].
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
DIGITS = ((0.3053,) * 3, (0.3759,) * 3)
FASHION_MNIST = ((0.2860,) * 3, (0.3530,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# How Pillow names pixels with so many channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def prepare(statistics: Statistics, *steps: Transform) -> v2.Compose:
    """From images through `steps` to normalised floats [..., 3, H, W]."""
    return v2.Compose([v2.ToImage(), v2.RGB(), *steps, *_normalise(statistics)])


def _normalise(statistics: Statistics) -> list[Transform]:
    mean, std = statistics
    to_floats = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
    return [*to_floats, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]


def augmentation(size: int, crop_padding: int, flip: bool, fill: float = 0.0) -> list[Transform]:
    """Random crops reaching into a border, and mirror images."""
    crop = [v2.RandomCrop(size, padding=crop_padding, fill=fill)] if crop_padding else []
    return [*crop, *([v2.RandomHorizontalFlip()] if flip else [])]


def stretch(shape: Shape) -> Transform:
    """Resizing to height and width of `(C, H, W)`, whatever the proportions were."""
    both: Transform = v2.Compose([v2.ToImage(), v2.Resize(list(shape[1:]), antialias=True)])
    return both


def cover(shape: Shape) -> Transform:
    """Resizing until height and width of `(C, H, W)` are covered; the centre is cropped."""

    def resize_and_crop(image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        scale = max(shape[1] / height, shape[2] / width)
        size = [max(shape[1], round(height * scale)), max(shape[2], round(width * scale))]
        return v2.functional.center_crop(v2.functional.resize(image, size), list(shape[1:]))

    return resize_and_crop


# How held-out images of a data set are normalised and get their size.
_HELD_OUT: dict[str, tuple[Statistics, Callable[[Shape], Transform]]] = {
    "digits": (DIGITS, stretch),
    "cifar10": (CIFAR10, cover),
    "cifar100": (CIFAR100, cover),
    "fashion_mnist": (FASHION_MNIST, cover),
    "image_folder": (IMAGENET, stretch),
}
# Data sets that timm prepares: `image_folder` unless it has a `crop_padding`.
_BY_TIMM = ("image_folder", "timm", "webdataset")


def timm_transforms(
    size: int, like: str | None, flip: bool, auto_augment: str | None, random_erasing: float
) -> tuple[Transform, Transform]:
    """What timm does with training images and with held-out ones, as a data set's options say."""
    options: dict[str, Any] = {"input_size": size, **transform_options(like)}
    try:
        crop = create_transform(
            **options,
            is_training=True,
            hflip=0.5 if flip else 0.0,
            color_jitter=0.0,
            auto_augment=auto_augment,
            re_prob=random_erasing,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"auto_augment={auto_augment!r} is no policy of timm's: {error}",
            expected="e.g. rand-m9-mstd0.5, augmix-m3-w3 or original",
        ) from error
    return crop, create_transform(**options)


def transform_options(like: str | None) -> dict[str, Any]:
    """How images are prepared for a model, as arguments of `timm.data.create_transform`.

    Args:
        like: timm or torchvision name of a model with trained weights; None for ImageNet's usual
            way.

    Raises:
        DataError: nothing is known of such a model.
    """
    if like is None:
        mean, std = IMAGENET
        return {"mean": mean, "std": std, "crop_pct": 0.875, "interpolation": "bilinear"}
    try:
        if like.startswith(TORCHVISION):
            evaluation = _torchvision_transform(like)
            return {
                "mean": tuple(evaluation.mean),
                "std": tuple(evaluation.std),
                "crop_pct": evaluation.crop_size[0] / evaluation.resize_size[0],
                "interpolation": evaluation.interpolation.value,
            }
        options = _timm_options(like)
    except (ValueError, RuntimeError):
        options = None
    if options is None:
        raise DataError(
            f"nothing is known of how images for {like!r} were prepared.",
            expected="the timm or torchvision name of a model with trained weights",
            next_step="Leave `like` out for ImageNet's usual way.",
        )
    return options


def _timm_options(name: str) -> dict[str, Any] | None:
    """What timm notes for a model's trained weights; None if it knows no such model."""
    weights = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    if weights is None:
        return None
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=asdict(weights))  # type: ignore[no-untyped-call]
    return {key: config[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}


def _torchvision_transform(name: str) -> Any:
    """What torchvision does with images before its trained weights see them."""
    return models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()


@dataclass(frozen=True)
class Preparation:
    """How decoded images become inputs `[C, H, W]` of an ensemble.

    Args:
        shape: of the images.
        geometry: from a decoded image to pixels of that height and width.
        mean: of each channel, pixels in 0 to 1.
        std: of each channel.
        source: where these come from, one phrase.
    """

    shape: Shape
    geometry: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __str__(self) -> str:
        """Shape, statistics and where they come from, in one line."""
        shape = " x ".join(map(str, self.shape))
        mean, std = (" ".join(f"{value:g}" for value in part) for part in (self.mean, self.std))
        return f"{shape}, mean {mean}, std {std} ({self.source})"

    def __call__(self, image: Image.Image) -> Tensor:
        """A decoded image as floats `[C, H, W]`."""
        steps = v2.Compose([self.geometry, *_normalise((self.mean, self.std))])
        tensor: Tensor = steps(image.convert(_MODES[self.shape[0]]))
        return tensor


def preparation_for(
    shape: Shape,
    *,
    data_set: str | None = None,
    options: Mapping[str, Any] | None = None,
    architecture: Architecture | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preparation:
    """What images go through before an ensemble sees them, as far as that is known.

    In this order: the held-out images' way in the data set it was trained on, what timm or
    torchvision note for the architecture's trained weights, and pixels in 0 to 1.

    Args:
        shape: of the ensemble's inputs.
        data_set: name of the data set it was trained on.
        options: of that data set.
        architecture: of its base model.
        mean: of each channel, or of all, instead of the known one.
        std: of each channel, or of all; to be set together with the mean.

    Raises:
        InputError: the inputs are no images, or the numbers do not fit their channels.
    """
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InputError(
            f"the ensemble takes inputs of shape {shape}, not files of images.",
            expected="(C, H, W) with 1, 3 or 4 channels",
            next_step="Load it with treeify.load and call hne.predict(x).",
        )
    if (mean is None) != (std is None):
        raise InputError(
            f"{'--mean' if std is None else '--std'} was given alone.", expected="both or neither"
        )
    preparation = (
        _of_data_set(data_set, options or {}, shape)
        or (architecture and _of_architecture(architecture.name, shape))
        or Preparation(shape, cover(shape), (0.0,), (1.0,), "pixels in 0 to 1: --mean, --std")
    )
    return Preparation(
        shape,
        preparation.geometry,
        _per_channel(preparation.mean if mean is None else mean, shape[0], "--mean"),
        _per_channel(preparation.std if std is None else std, shape[0], "--std"),
        preparation.source if mean is None else "--mean and --std",
    )


def _per_channel(values: Sequence[float], channels: int, option: str) -> tuple[float, ...]:
    """One number for each channel: a single one is for all, and grey is the mean of colours."""
    if channels == 1 and len(values) == 3:
        return (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise InputError(
            f"{option} has {len(values)} numbers, images have {channels} channels.",
            expected=f"1 number or {channels}, e.g. {option} 0.5",
        )
    return tuple(values) * (channels // len(values))


def _of_data_set(name: str | None, options: Mapping[str, Any], shape: Shape) -> Preparation | None:
    """How a data set's held-out images are prepared; None for data sets of the user's own."""
    source = f"held-out images of {name}, from the run's recipe"
    if name in _BY_TIMM and options.get("crop_padding") is None:
        return _by_timm(transform_options(options["like"]), shape, source)
    if name not in _HELD_OUT:
        return None
    (mean, std), resize = _HELD_OUT[name]
    return Preparation(shape, resize(shape), tuple(mean), tuple(std), source)


def _of_architecture(name: str, shape: Shape) -> Preparation | None:
    """How timm or torchvision prepare images for a model's trained weights."""
    if ":" in name:
        return None
    if not name.startswith(TORCHVISION):
        options = _timm_options(name)
        source = f"timm's for {name.removeprefix(TIMM)}"
        return None if options is None else _by_timm(options, shape, source)
    evaluation = _torchvision_transform(name)
    scale = evaluation.resize_size[0] / evaluation.crop_size[0]
    resize = v2.Resize(round(max(shape[1:]) * scale), interpolation=evaluation.interpolation)
    geometry = v2.Compose([resize, v2.CenterCrop(list(shape[1:]))])
    mean, std = tuple(evaluation.mean), tuple(evaluation.std)
    return Preparation(shape, geometry, mean, std, f"torchvision's for {name}")


def _by_timm(options: Mapping[str, Any], shape: Shape, source: str) -> Preparation:
    """What `timm.data.create_transform` makes of its arguments."""
    # Unnormalised: the user may have other statistics.
    geometry = create_transform(**{"input_size": shape, **options}, normalize=False)
    return Preparation(shape, geometry, options["mean"], options["std"], source)


def read_files(files: Sequence[Path], preparation: Preparation) -> Tensor:
    """A batch of images `[N, C, H, W]` from their files.

    Args:
        files: in any format that Pillow decodes; turned as their EXIF orientation says.
        preparation: of each image.

    Raises:
        DataError: files are missing or cannot be decoded; all of them are named.
    """
    images: list[Tensor] = []
    problems: list[str] = []
    for file in files:
        try:
            images.append(preparation(_decode(file)))
        except Exception as error:  # noqa: PERF203 - a damaged file makes decoders raise anything
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            problems.append(f"{str(file)!r}: {reason}")
    if problems:
        count = "an image" if len(problems) == 1 else f"{len(problems)} images"
        raise DataError(
            "\n  ".join([f"{count} of {len(files)} cannot be read.", *problems]),
            expected="files in a format that Pillow decodes, 8 bits per channel",
            next_step="Nothing was computed. Correct or remove these.",
        )
    return torch.stack(images)


def _decode(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per channel, which would be cut off")
        image = ImageOps.exif_transpose(opened)
        image.load()
        return image
