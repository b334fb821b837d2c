"""What is known of how images are prepared: for trained weights of libraries, and in data sets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import timm
from timm.data import resolve_data_config
from torchvision import models

from treeify.data.preparation import CropMode, Preparation
from treeify.errors import DataError
from treeify.models.builders import TIMM, TORCHVISION
from treeify.models.image_size import Size, height_and_width

Statistics = tuple[Sequence[float], Sequence[float]]

# Mean and standard deviation of the training images' channels, pixels in [0, 1].
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
DIGITS = ((0.3053,) * 3, (0.3759,) * 3)
FASHION_MNIST = ((0.2860,) * 3, (0.3530,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
        options = _torchvision_options(like) if _is_torchvision(like) else _timm_options(like)
    except (ValueError, RuntimeError):
        options = None
    if options is None:
        raise DataError(
            f"nothing is known of how images for {like!r} were prepared.",
            expected="the timm or torchvision name of a model with trained weights",
            next_step="Leave `like` out for ImageNet's usual way.",
        )
    return options


def _is_torchvision(name: str) -> bool:
    return name.startswith(TORCHVISION)


def _timm_options(name: str) -> dict[str, Any] | None:
    """What timm notes for a model's trained weights; None if it knows no such model."""
    weights = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    if weights is None:
        return None
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=asdict(weights))  # type: ignore[no-untyped-call]
    return {key: config[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}


def _torchvision_options(name: str) -> dict[str, Any]:
    """What torchvision does with images before its trained weights see them, in timm's words."""
    evaluation = models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()
    fraction = evaluation.crop_size[0] / evaluation.resize_size[0]
    return {
        "mean": tuple(evaluation.mean),
        "std": tuple(evaluation.std),
        # timm divides by it and rounds down, which must not lose a pixel.
        "crop_pct": math.nextafter(fraction, 0),
        "interpolation": evaluation.interpolation.value,
    }


def of_files(
    size: Size,
    *,
    like: str | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    squash: bool = False,
    source: str,
) -> Preparation:
    """How a data set of image files prepares those that are held out.

    Args:
        size: height and width in pixels, or both as one number.
        like: timm or torchvision name of the model whose trained weights are used.
        channels: by default 3.
        mean: of each channel, or of all, instead of the model's or ImageNet's.
        std: the same.
        crop_pct: the fraction of the resized image that is cropped, instead of the model's.
        squash: resize both sides, whatever the proportions were, and crop nothing.
        source: where all this comes from, one phrase.

    Raises:
        DataError: nothing is known of the model.
        InputError: the numbers do not fit each other.
    """
    options = transform_options(like)
    if crop_pct is not None:
        options["crop_pct"] = crop_pct
    if squash:
        options |= {"crop_mode": "squash", "crop_pct": 1.0}
    if mean is not None or std is not None:
        options |= {"mean": mean, "std": std}
    return Preparation(
        size=height_and_width(size), channels=channels or 3, source=source, **options
    )


_SMALL_IMAGES: dict[str, tuple[Statistics, CropMode]] = {
    "digits": (DIGITS, "squash"),
    "cifar10": (CIFAR10, "center"),
    "cifar100": (CIFAR100, "center"),
    "fashion_mnist": (FASHION_MNIST, "center"),
}


def of_small_images(
    name: str, size: Size, channels: int | None, source: str | None = None
) -> Preparation:
    """How a data set of small images prepares them; files of another size are resized.

    Args:
        name: of the data set.
        size: height and width in pixels, or both as one number.
        channels: by default 3.
        source: where this comes from, one phrase.

    Raises:
        InputError: nothing is known of so many channels.
    """
    (mean, std), crop_mode = _SMALL_IMAGES[name]
    return Preparation(
        size=height_and_width(size),
        mean=tuple(mean),
        std=tuple(std),
        channels=channels or 3,
        crop_mode=crop_mode,
        source=source or f"held-out images of {name}",
    )


def of_trained_weights(name: str, shape: Sequence[int]) -> Preparation | None:
    """What timm or torchvision note for a model's trained weights.

    Args:
        name: of an `Architecture`.
        shape: of the inputs, `(C, H, W)`.

    Returns:
        None for models of the user's own and inputs that are no images.
    """
    if ":" in name or len(shape) != 3 or shape[0] not in (1, 3):
        return None
    if _is_torchvision(name):
        options: dict[str, Any] | None = _torchvision_options(name)
        source = f"torchvision's for {name}"
    else:
        options = _timm_options(name)
        source = f"timm's for {name.removeprefix(TIMM)}"
    if options is None:
        return None
    return Preparation(size=(shape[1], shape[2]), channels=shape[0], source=source, **options)


def of_data_set(
    name: str, options: Mapping[str, Any], shape: tuple[int, int, int]
) -> Preparation | None:
    """How the held-out images of a data set are prepared, by its name and options alone.

    What runs of earlier versions did, whose ensembles do not say it.

    Args:
        name: of the data set.
        options: of that data set.
        shape: of the ensemble's inputs, `(C, H, W)`.

    Returns:
        None for data sets of the user's own.
    """
    source = f"held-out images of {name}, from the run's recipe"
    if name in _SMALL_IMAGES:
        return of_small_images(name, shape[1:], shape[0], source)
    if name not in ("image_folder", "timm", "webdataset"):
        return None
    return of_files(
        shape[1:],
        channels=shape[0],
        squash=options.get("crop_padding") is not None,
        source=source,
        **{key: options.get(key) for key in ("like", "mean", "std", "crop_pct")},
    )
