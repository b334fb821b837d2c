"""Data sets of small images: scikit-learn's digits and torchvision's."""

from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt
from torch.utils.data import TensorDataset
from torchvision import datasets

from treeify.arguments import as_path
from treeify.data.augmentation import Padded, padded_crop
from treeify.data.conventions import of_small_images
from treeify.data.data_set import Data, Transformed, in_parts, register
from treeify.data.preparation import Preparation
from treeify.errors import DataError
from treeify.registry import Channels, FilePath, ImageSize


@register("digits")
def digits(
    *,
    size: ImageSize = 8,
    channels: Channels | None = None,
    crop_padding: NonNegativeInt = 0,
    flip: bool = False,
    held_out: PositiveInt = 360,
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
) -> Data:
    """The 1,797 handwritten digits that scikit-learn ships; nothing is downloaded.

    Args:
        size: height and width in pixels, `[H, W]` if they differ; the scans are 8 x 8 and resized
            bilinearly.
        channels: 1, or grey repeated to 3; null is as many as the model takes.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.
        held_out: number of held-out images, the same fraction of each class.
        split_seed: scikit-learn's `random_state` for the split.

    Returns:
        10 classes.

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
    scans = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)
    labels: list[int] = bunch.target.tolist()
    pictures = [Image.fromarray(scan.numpy()) for scan in scans]
    examples = list(zip(pictures, labels, strict=True))
    preparation = of_small_images("digits", size, channels)
    train_indices, held_out_indices = train_test_split(
        range(len(labels)), test_size=held_out, stratify=bunch.target, random_state=split_seed
    )
    # Prepared once: they all fit into memory, and are augmented as they are.
    images = torch.stack([preparation(pictures[index]) for index in train_indices])
    augment = padded_crop(size, crop_padding, flip, fill=images.min().item())
    return Data(
        Transformed(TensorDataset(images, torch.tensor(labels)[train_indices]), augment),
        Transformed([examples[index] for index in held_out_indices], preparation),
        tuple(map(str, bunch.target_names)),
        f"{held_out:,} of {len(labels):,} images held out, stratified by class, "
        f"random_state={split_seed}",
        preparation,
    )


@register("cifar10")
def cifar10(
    *,
    root: FilePath = "data",
    download: bool = False,
    channels: Channels | None = None,
    crop_padding: NonNegativeInt = 4,
    flip: bool = True,
) -> Data:
    """CIFAR-10, 50,000 training and 10,000 test images of 32 x 32 pixels.

    Args:
        root: directory holding, or to hold, the files.
        download: fetch the files when they are missing.
        channels: 1 for grey or 3 for colour; null is as many as the model takes.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.

    Returns:
        10 classes; the test set is held out.

    Raises:
        DataError: the files are missing, damaged or cannot be fetched.
    """
    preparation = of_small_images("cifar10", 32, channels)
    return _from_torchvision(datasets.CIFAR10, root, download, preparation, crop_padding, flip)


@register("cifar100")
def cifar100(
    *,
    root: FilePath = "data",
    download: bool = False,
    channels: Channels | None = None,
    crop_padding: NonNegativeInt = 4,
    flip: bool = True,
) -> Data:
    """CIFAR-100, 50,000 training and 10,000 test images of 32 x 32 pixels.

    Args:
        root: directory holding, or to hold, the files.
        download: fetch the files when they are missing.
        channels: 1 for grey or 3 for colour; null is as many as the model takes.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.

    Returns:
        100 classes; the test set is held out.

    Raises:
        DataError: the files are missing, damaged or cannot be fetched.
    """
    preparation = of_small_images("cifar100", 32, channels)
    return _from_torchvision(datasets.CIFAR100, root, download, preparation, crop_padding, flip)


@register("fashion_mnist")
def fashion_mnist(
    *,
    root: FilePath = "data",
    download: bool = False,
    channels: Channels | None = None,
    crop_padding: NonNegativeInt = 2,
    flip: bool = True,
) -> Data:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 28 x 28 grey pixels.

    Args:
        root: directory holding, or to hold, the files.
        download: fetch the files when they are missing.
        channels: 1 for grey or 3 for colour; null is as many as the model takes.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.

    Returns:
        10 classes; the test set is held out.

    Raises:
        DataError: the files are missing, damaged or cannot be fetched.
    """
    preparation = of_small_images("fashion_mnist", 28, channels)
    return _from_torchvision(datasets.FashionMNIST, root, download, preparation, crop_padding, flip)


def _from_torchvision(
    kind: type[Any],
    root: str,
    download: bool,
    preparation: Preparation,
    crop_padding: int,
    flip: bool,
) -> Data:
    """A data set of torchvision's that comes in a training part and a test part."""
    folder = as_path("root", root, DataError)
    try:
        train, held_out = (kind(folder, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for missing files
        raise DataError(
            f"{kind.__name__} cannot be read from {str(folder.resolve())!r}.",
            expected="the files torchvision downloads, complete and undamaged",
            found=str(error),
            next_step="Set data.root to where they are, or data.download=true to fetch them.",
        ) from error
    augment = Padded(preparation, crop_padding, flip)
    return in_parts(train, held_out, augment, preparation, train.classes, "test images")
