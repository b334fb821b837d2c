"""Data sets of small images: scikit-learn's digits and torchvision's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from treeify.data.data_set import Data, Transformed, in_parts, register
from treeify.data.preparation import (
    CIFAR10,
    CIFAR100,
    DIGITS,
    FASHION_MNIST,
    Statistics,
    Transform,
    augmentation,
    prepare,
    stretch,
)
from treeify.errors import DataError


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
        held_out: number of held-out images, the same fraction of each class.
        split_seed: scikit-learn's `random_state` for the split.

    Returns:
        10 classes, one channel repeated to three.

    Raises:
        DataError: the split leaves a side without some of the digits.
    """
    # Importing it takes over a second, which every command would wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    if not len(bunch.target_names) <= held_out <= len(bunch.target) - len(bunch.target_names):
        raise DataError(
            f"{held_out} of {len(bunch.target):,} digits cannot be held out.",
            expected=f"at least {len(bunch.target_names)} images on both sides of the split",
        )
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    images = prepare(DIGITS, stretch((3, size, size)))(pixels)
    labels = torch.from_numpy(bunch.target)
    train_indices, held_out_indices = train_test_split(
        range(len(labels)), test_size=held_out, stratify=bunch.target, random_state=split_seed
    )
    crop = augmentation(size, crop_padding, flip, fill=images.min().item())
    augment = v2.Compose([v2.Identity(), *crop])
    return Data(
        Transformed(TensorDataset(images[train_indices], labels[train_indices]), augment),
        TensorDataset(images[held_out_indices], labels[held_out_indices]),
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
    augment = augmentation(32, crop_padding, flip)
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
    augment = augmentation(32, crop_padding, flip)
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
    augment = augmentation(28, crop_padding, flip)
    return _from_torchvision(datasets.FashionMNIST, root, download, FASHION_MNIST, augment)


def _from_torchvision(
    kind: type[Any],
    root: str,
    download: bool,
    statistics: Statistics,
    augment: Sequence[Transform],
) -> Data:
    """A data set of torchvision's that comes in a training part and a test part."""
    try:
        train, held_out = (kind(root, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for missing files
        raise DataError(
            f"{kind.__name__} cannot be read from {str(Path(root).resolve())!r}.",
            expected="the files torchvision downloads, complete and undamaged",
            found=str(error),
            next_step="Set data.root to where they are, or data.download=true to fetch them.",
        ) from error
    crop, fit = prepare(statistics, *augment), prepare(statistics)
    return in_parts(train, held_out, crop, fit, train.classes, "test images")
