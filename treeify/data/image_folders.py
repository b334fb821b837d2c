"""Folders of images, one folder per class."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from treeify.data.augmentation import Padded, ResizedCrop
from treeify.data.conventions import of_files
from treeify.data.data_set import Data, in_parts, register
from treeify.data.image_files import is_visible, open_image
from treeify.errors import DataError, quoted
from treeify.registry import Channels, FilePath, Fraction, ImageSize, Numbers


@register("image_folder")
def image_folder(
    *,
    root: FilePath,
    size: ImageSize = 224,
    like: str | None = None,
    channels: Channels | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    crop_padding: NonNegativeInt | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: Fraction = 0.0,
) -> Data:
    """Your own images: `root/train/CLASS/*` to train on and `root/val/CLASS/*` held out.

    They are prepared by timm: training images are random crops resized to `size`, held-out ones are
    resized to `size / 0.875` and cropped at the centre, and channels normalised by ImageNet's
    statistics; `like` takes all this from a trained model. With `crop_padding`, meant for small
    images, all are resized to `size` and training images cropped with that much padding.

    The training folders number the classes, in alphabetical order. Names that begin with a dot are
    neither classes nor images.

    Args:
        root: directory with the folders `train` and `val`, each with one folder per class.
        size: height and width in pixels, `[H, W]` if they differ.
        like: timm or torchvision name of the model whose trained weights are used; its statistics,
            fraction of the centre crop and interpolation are followed.
        channels: 1 for grey, 3 for colour, 4 with opacity; null is as many as the model takes.
        mean: of each channel, pixels in 0 to 1, or one for all; instead of those of `like`.
        std: the same; with `mean`.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`; not with `crop_padding`.
        random_erasing: probability of blanking a rectangle; not with `crop_padding`.

    Returns:
        As many classes as there are training folders.

    Raises:
        DataError: a training folder is missing or empty, `val` has other classes, nothing is known
            of the model, or an augmentation is unknown.
        InputError: mean, std and channels do not fit each other.
    """
    if crop_padding is not None and (like or auto_augment or random_erasing):
        raise DataError(
            "crop_padding leaves no room for like, auto_augment or random_erasing.",
            next_step="Leave crop_padding out, or these.",
        )
    preparation = of_files(
        size,
        like=like,
        channels=channels,
        mean=mean,
        std=std,
        squash=crop_padding is not None,
        source="held-out images of image_folder",
    )
    augment: Any
    if crop_padding is None:
        augment = ResizedCrop(preparation, flip, auto_augment, random_erasing)
    else:
        augment = Padded(preparation, crop_padding, flip)
    train = _Part(Path(root).absolute() / "train")
    held_out = _Part(Path(root).absolute() / "val", train.classes)
    where = f"images of {Path(root) / 'val'}"
    return in_parts(train, held_out, augment, preparation, train.classes, where, held_out.targets)


class _Part(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """The opened images of one part and their classes, numbered as in the training part."""

    def __init__(self, root: Path, numbered: Sequence[str] | None = None) -> None:
        self.numbered = numbered
        is_image = partial(_is_image, root=root)
        super().__init__(root, loader=open_image, is_valid_file=is_image, allow_empty=True)
        present = {self.classes[label] for label in self.targets}
        empty = [name for name in self.classes if name not in present]
        if not present or (empty and numbered is None):
            raise _nothing(root, f"no images of {quoted(empty)}")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The folders' names, and the number of each."""
        names = folders_in(Path(directory))
        if not names:
            raise _nothing(Path(directory), "no folders in it")
        if self.numbered is not None:
            check_numbered(names, self.numbered, str(directory))
            names = list(self.numbered)
        return names, {name: index for index, name in enumerate(names)}


def folders_in(directory: Path) -> list[str]:
    """The names of the classes that a directory has folders for, in alphabetical order."""
    if not directory.is_dir():
        raise _nothing(directory, "no such directory")
    return sorted(
        entry.name
        for entry in os.scandir(directory)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def check_numbered(names: Sequence[str], numbered: Sequence[str], where: str) -> None:
    """Raise DataError unless all classes of a held-out part are trained on."""
    if unknown := [name for name in names if name not in numbered]:
        raise DataError(
            f"{where} has classes that are not trained on: {quoted(unknown)}.",
            expected=f"some of {quoted(numbered)}",
            next_step="Rename or remove them, or add them to the training part (and class_map).",
        )


def _is_image(path: str, *, root: Path) -> bool:
    inside = Path(path).relative_to(root).as_posix()
    return path.lower().endswith(IMG_EXTENSIONS) and is_visible(inside)


def _nothing(directory: Path, problem: str) -> DataError:
    return DataError(
        f"no images to be found in {str(directory)!r}.",
        expected="one folder per class with images in it, e.g. "
        f"{str(directory / 'cat' / '1.jpg')!r}",
        found=problem,
        next_step="Set data.root to the directory that holds 'train' and 'val'; a class without"
        " training images can only be left out.",
    )
