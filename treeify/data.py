"""Data sets by name: images ready to train on, and a fixed held-out part.

Every data set is a function of keyword options that returns a `Data`; a recipe names the function
and sets its options. Adding one:

    @treeify.data.register("my_images")
    def my_images(*, root: str) -> treeify.data.Data: ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import NonNegativeInt, PositiveInt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

from treeify.architecture import TIMM, TORCHVISION
from treeify.errors import DataError
from treeify.registry import Registry

Transform = Callable[[Any], Any]
Examples = Dataset[Any]
Statistics = tuple[Sequence[float], Sequence[float]]

SOURCES = Registry("data set")
register = SOURCES.register

# Mean and standard deviation of the training images' channels, pixels in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
FASHION_MNIST = ((0.2860,) * 3, (0.3530,) * 3)
DIGITS = ((0.3053,) * 3, (0.3759,) * 3)


class UnreadableImageError(DataError):
    """An image file is damaged.

    Args:
        path: of the file.
        reason: what reading it said.
    """

    def __init__(self, path: str, reason: Exception) -> None:
        super().__init__(
            f"{path!r} cannot be read as an image.",
            found=str(reason),
            next_step="Replace or remove the file, or set skip_corrupt to pass over so many.",
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Loader workers send it to their parent."""
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Data:
    """A data set split into training and held-out examples.

    Args:
        train: augmented training examples, an image [3, H, W] float and its class.
        held_out: examples never trained on, without augmentation.
        classes: the classes' names, in the order of their indices; there are `K`.
        split: how the held-out examples were chosen, one phrase for reports.
    """

    train: Examples
    held_out: Examples
    classes: tuple[str, ...]
    split: str

    def example(self) -> Tensor:
        """The first held-out image that can be read, [3, H, W].

        Raises:
            DataError: there is none.
        """
        for index in range(len(self.held_out)):  # type: ignore[arg-type]
            with contextlib.suppress(UnreadableImageError):
                image: Tensor = self.held_out[index][0]
                return image
        raise DataError("none of the held-out images can be read.")


@register("digits")
def digits(
    *,
    size: PositiveInt = 8,
    crop_padding: NonNegativeInt = 0,
    flip: bool = False,
    held_out: PositiveInt = 360,
    split_seed: NonNegativeInt = 0,
) -> Data:
    """The 1,797 handwritten digits that scikit-learn ships; nothing is downloaded.

    Args:
        size: height and width in pixels; the scans are 8 x 8 and resized bilinearly.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.
        held_out: number of held-out images, the same share of each class.
        split_seed: scikit-learn's `random_state` for the split.

    Returns:
        10 classes, one channel repeated to three.

    Raises:
        DataError: the split leaves a side without some of the digits.
    """
    bunch = load_digits()
    if not len(bunch.target_names) <= held_out <= len(bunch.target) - len(bunch.target_names):
        raise DataError(
            f"{held_out} of {len(bunch.target):,} digits cannot be held out.",
            expected=f"at least {len(bunch.target_names)} images on both sides of the split",
        )
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    images = _prepare(DIGITS, v2.Resize([size, size], antialias=True))(pixels)
    labels = torch.from_numpy(bunch.target)
    train, rest = train_test_split(
        range(len(labels)), test_size=held_out, stratify=bunch.target, random_state=split_seed
    )
    augment = _augment(size, crop_padding, flip, fill=images.min().item())
    return Data(
        _transformed(TensorDataset(images[train], labels[train]), augment),
        TensorDataset(images[rest], labels[rest]),
        tuple(map(str, bunch.target_names)),
        f"{held_out:,} of {len(labels):,} images held out, stratified by class, "
        f"random_state={split_seed}",
    )


@register("cifar10")
def cifar10(
    *,
    root: str = "data",
    download: bool = False,
    crop_padding: NonNegativeInt = 4,
    flip: bool = True,
) -> Data:
    """CIFAR-10, 50,000 training and 10,000 test images of 32 x 32 pixels.

    Args:
        root: directory holding, or to hold, the files.
        download: fetch the files when they are missing.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.

    Returns:
        10 classes; the test set is held out.

    Raises:
        DataError: the files are missing, damaged or cannot be fetched.
    """
    augment = _augment(32, crop_padding, flip)
    return _from_torchvision(datasets.CIFAR10, root, download, CIFAR10, augment)


@register("cifar100")
def cifar100(
    *,
    root: str = "data",
    download: bool = False,
    crop_padding: NonNegativeInt = 4,
    flip: bool = True,
) -> Data:
    """CIFAR-100, 50,000 training and 10,000 test images of 32 x 32 pixels.

    Args:
        root: directory holding, or to hold, the files.
        download: fetch the files when they are missing.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.

    Returns:
        100 classes; the test set is held out.

    Raises:
        DataError: the files are missing, damaged or cannot be fetched.
    """
    augment = _augment(32, crop_padding, flip)
    return _from_torchvision(datasets.CIFAR100, root, download, CIFAR100, augment)


@register("fashion_mnist")
def fashion_mnist(
    *,
    root: str = "data",
    download: bool = False,
    crop_padding: NonNegativeInt = 2,
    flip: bool = True,
) -> Data:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 28 x 28 grey pixels.

    Args:
        root: directory holding, or to hold, the files.
        download: fetch the files when they are missing.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.

    Returns:
        10 classes, one channel repeated to three; the test set is held out.

    Raises:
        DataError: the files are missing, damaged or cannot be fetched.
    """
    augment = _augment(28, crop_padding, flip)
    return _from_torchvision(datasets.FashionMNIST, root, download, FASHION_MNIST, augment)


@register("image_folder")
def image_folder(
    *,
    root: str,
    size: PositiveInt = 224,
    like: str | None = None,
    crop_padding: NonNegativeInt | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
) -> Data:
    """Your own images: `root/train/CLASS/*` to train on and `root/val/CLASS/*` held out.

    They are prepared by timm: training images are random crops resized to `size`, held-out ones are
    resized to `size / 0.875` and cropped at the centre, and channels normalised by ImageNet's
    statistics; `like` takes all this from a trained model. With `crop_padding`, meant for small
    images, all are resized to `size` and training images cropped with that much padding.

    Args:
        root: directory with the folders `train` and `val`, each with one folder per class.
        size: height and width in pixels.
        like: timm or torchvision name of the model whose trained weights are used; its statistics,
            share of the centre crop and interpolation are followed.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`; not with `crop_padding`.
        random_erasing: probability of blanking a rectangle; not with `crop_padding`.

    Returns:
        As many classes as there are folders.

    Raises:
        DataError: a folder is missing or empty, `train` and `val` have different classes, nothing
            is known of the model, or an augmentation is unknown.
    """
    if crop_padding is not None and (like or auto_augment or random_erasing):
        raise DataError(
            "crop_padding leaves no room for like, auto_augment or random_erasing.",
            next_step="Leave crop_padding out, or these.",
        )
    train, held_out = (_folder(Path(root), part) for part in ("train", "val"))
    _check_same_classes(train, held_out)
    crop: Transform
    fit: Transform
    if crop_padding is None:
        config = {"input_size": size, **preparation(like)}
        fit = create_transform(**config)
        try:
            crop = create_transform(
                **config,
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
    else:
        resize = v2.Resize([size, size], antialias=True)
        fit = _prepare(IMAGENET, resize)
        crop = _prepare(IMAGENET, resize, *_augment(size, crop_padding, flip))
    return Data(
        _Transformed(train, crop),
        _Transformed(held_out, fit),
        tuple(train.classes),
        f"the {len(held_out):,} images of {Path(root) / 'val'} held out",
    )


def preparation(like: str | None) -> dict[str, Any]:
    """How images are prepared for a model, as arguments of `timm.data.create_transform`.

    Args:
        like: timm or torchvision name of a model with trained weights; none for ImageNet's usual
            way.

    Raises:
        DataError: nothing is known of such a model.
    """
    if like is None:
        mean, std = IMAGENET
        return {"mean": mean, "std": std, "crop_pct": 0.875, "interpolation": "bilinear"}
    try:
        if like.startswith(TORCHVISION):
            name = like.removeprefix(TORCHVISION)
            usual = models.get_model_weights(name).DEFAULT.transforms()
            return {
                "mean": tuple(usual.mean),
                "std": tuple(usual.std),
                "crop_pct": usual.crop_size[0] / usual.resize_size[0],
                "interpolation": usual.interpolation.value,
            }
        known = timm.get_pretrained_cfg(like.removeprefix(TIMM))
    except (ValueError, RuntimeError):
        known = None
    if known is None:
        raise DataError(
            f"nothing is known of how images for {like!r} were prepared.",
            expected="the timm or torchvision name of a model with trained weights",
            next_step="Leave `like` out for ImageNet's usual way.",
        )
    found: dict[str, Any] = resolve_data_config(pretrained_cfg=asdict(known))  # type: ignore[no-untyped-call]
    return {key: found[key] for key in ("mean", "std", "crop_pct", "interpolation")}


class _Transformed(Dataset[tuple[Tensor, Any]]):
    """Examples whose images go through a transform each time they are read."""

    def __init__(self, examples: Any, transform: Transform) -> None:
        self.examples = examples
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.examples[index]
        return self.transform(image), label

    def __len__(self) -> int:
        return len(self.examples)


def _transformed(examples: Any, steps: Sequence[Transform]) -> Examples:
    return _Transformed(examples, v2.Compose(steps)) if steps else examples


def _prepare(statistics: Statistics, *steps: Transform) -> v2.Compose:
    """From images through `steps` to normalised floats [..., 3, H, W]."""
    mean, std = statistics
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RGB(),
            *steps,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            v2.ToPureTensor(),
        ]
    )


def _augment(size: int, crop_padding: int, flip: bool, fill: float = 0.0) -> list[Transform]:
    crop = [v2.RandomCrop(size, padding=crop_padding, fill=fill)] if crop_padding else []
    return [*crop, *([v2.RandomHorizontalFlip()] if flip else [])]


def _from_torchvision(
    kind: type[Any],
    root: str,
    download: bool,
    statistics: Statistics,
    augment: Sequence[Transform],
) -> Data:
    try:
        train, held_out = (kind(root, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for missing files
        raise DataError(
            f"{kind.__name__} cannot be read from {str(Path(root).resolve())!r}.",
            expected="the files torchvision downloads, complete and undamaged",
            found=str(error),
            next_step="Set data.root to where they are, or data.download=true to fetch them.",
        ) from error
    return Data(
        _Transformed(train, _prepare(statistics, *augment)),
        _Transformed(held_out, _prepare(statistics)),
        tuple(train.classes),
        f"the {len(held_out):,} test images held out",
    )


def _folder(root: Path, part: str) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(root / part, loader=_read_image)
    except FileNotFoundError as error:
        raise DataError(
            f"no images to be found in {str(root / part)!r}.",
            expected="one folder per class with images in it, e.g. "
            f"{str(root / part / 'cat' / '1.jpg')!r}",
            found=str(error).splitlines()[0],
            next_step="Set data.root to the directory that holds 'train' and 'val'.",
        ) from error


def _read_image(path: str) -> Any:
    try:
        return datasets.folder.default_loader(path)
    except OSError as error:
        raise UnreadableImageError(path, error) from error


def _check_same_classes(train: datasets.ImageFolder, held_out: datasets.ImageFolder) -> None:
    if train.classes == held_out.classes:
        return
    only_train = sorted(set(train.classes) - set(held_out.classes))
    only_held_out = sorted(set(held_out.classes) - set(train.classes))
    raise DataError(
        f"{train.root} and {held_out.root} have different classes.",
        expected="the same class folders in both",
        found=f"only in train: {only_train or 'none'}; only in val: {only_held_out or 'none'}",
        next_step="Add or remove those folders.",
    )
