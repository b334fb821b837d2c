"""Folders of images, one folder per class."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from treeify.arguments import as_path
from treeify.data.augmentation import Padded, ResizedCrop
from treeify.data.conventions import of_files
from treeify.data.data_set import Data, in_parts, register
from treeify.data.folders import walk
from treeify.data.image_files import open_image
from treeify.data.preparation import Preparation
from treeify.errors import DataError, quoted
from treeify.registry import Channels, Crop, FilePath, Fraction, ImageSize, Numbers


@register("image_folder")
def image_folder(
    *,
    root: FilePath,
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None,
    split_seed: int = 0,
    size: ImageSize = 224,
    like: str | None = None,
    channels: Channels | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    crop_pct: Crop | None = None,
    crop_padding: NonNegativeInt | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: Fraction = 0.0,
) -> Data:
    """Your own images: `root/train/CLASS/*` to train on and `root/val/CLASS/*` held out.

    Of `root/CLASS/*` a part is held out. Which images these are depends on their names and
    `split_seed`: a copy of the folder is divided alike, and so are nearly all images when others
    are added.

    They are prepared by timm: training images are random crops resized to `size`, held-out ones are
    resized to `size / 0.875` and cropped at the centre, and channels normalised by ImageNet's
    statistics; `like` takes all this from a trained model. With `crop_padding`, meant for small
    images, all are resized to `size` and training images cropped with that much padding.

    The training folders number the classes, in alphabetical order. Names that begin with a dot are
    neither classes nor images.

    Args:
        root: directory with the folders `train` and `val`, each with one folder per class; or with
            one folder per class.
        held_out: fraction of each class that is held out where `root` has the classes themselves;
            null is 0.2 there.
        split_seed: chooses which images these are.
        size: height and width in pixels, `[H, W]` if they differ.
        like: timm or torchvision name of the model whose trained weights are used; its statistics,
            fraction of the centre crop and interpolation are followed.
        channels: 1 for grey, 3 for colour, 4 with opacity; null is as many as the model takes.
        mean: of each channel, pixels in 0 to 1, or one for all; instead of those of `like`.
        std: the same; with `mean`.
        crop_pct: fraction of the resized image that the held-out images' centre crop keeps, 1.0 to
            crop nothing of a square; instead of that of `like`, or 0.875.
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
    if crop_padding is not None and (like or auto_augment or random_erasing or crop_pct):
        raise DataError(
            "crop_padding leaves no room for like, crop_pct, auto_augment or random_erasing.",
            next_step="Leave crop_padding out, or these.",
        )
    preparation = of_files(
        size,
        like=like,
        channels=channels,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        squash=crop_padding is not None,
        source="held-out images of image_folder",
    )
    augment: Any
    if crop_padding is None:
        augment = ResizedCrop(preparation, flip, auto_augment, random_erasing)
    else:
        augment = Padded(preparation, crop_padding, flip)
    folder = as_path("root", root, DataError).absolute()
    if not is_divided(folder):
        return _divided(_Part(folder), held_out or 0.2, split_seed, augment, preparation)
    if held_out is not None:
        raise DataError(
            f"{str(folder)!r} has images held out already: those in 'val'.",
            expected=f"no held_out (it is {held_out:g}), or a directory of class folders",
            next_step=f"Leave held_out out, or set data.root to {str(folder / 'train')!r}.",
        )
    train = _Part(folder / "train")
    val = _Part(folder / "val", train.classes)
    where = f"images of {folder / 'val'}"
    return in_parts(train, val, augment, preparation, train.classes, where, val.targets)


class _Part(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """The opened images of one part and their classes, numbered as in the training part."""

    def __init__(self, root: Path, numbered: Sequence[str] | None = None) -> None:
        self.numbered = numbered
        super().__init__(root, loader=open_image, allow_empty=True)
        present = {self.classes[label] for label in self.targets}
        empty = [name for name in self.classes if name not in present]
        if not present or (empty and numbered is None):
            raise _nothing(root, f"no images of {quoted(empty)}")

    @staticmethod
    def make_dataset(
        directory: str | Path, class_to_idx: Mapping[str, int], *_: Any, **__: Any
    ) -> list[tuple[str, int]]:
        """Every image's path and class, in alphabetical order; torchvision walks in circles."""
        return [
            (os.path.join(folder, name), class_to_idx[class_name])  # noqa: PTH118 - a million times
            for class_name in sorted(class_to_idx)
            for folder, names in sorted(walk(Path(directory, class_name)))
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS)
        ]

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The folders' names, and the number of each."""
        names = folders_in(Path(directory))
        if not names:
            raise _nothing(Path(directory), "no folders in it")
        if self.numbered is not None:
            check_numbered(names, self.numbered, str(directory))
            names = list(self.numbered)
        return names, {name: index for index, name in enumerate(names)}


def _divided(
    images: _Part, fraction: float, seed: int, augment: Any, preparation: Preparation
) -> Data:
    """A folder's images in two parts: of each class nearly the same fraction is held out."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(images.targets):
        of_class.setdefault(label, []).append(index)

    def place(index: int) -> bytes:
        inside = Path(images.samples[index][0]).relative_to(images.root).as_posix()
        return hashlib.sha256(f"{seed} {inside}".encode()).digest()

    held_out: list[int] = []
    for members in of_class.values():
        # One at least to train on, and of two or more one at least to measure on.
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out += sorted(members, key=place)[:count]
    train = sorted({*range(len(images))}.difference(held_out))
    what = f"of {len(images):,} images of {images.root}, {fraction:.0%} of each class by"
    what = f"{what} split_seed={seed},"
    labels = [images.targets[index] for index in held_out]
    learned: Subset[Any] = Subset(images, train)
    measured: Subset[Any] = Subset(images, sorted(held_out))
    return in_parts(learned, measured, augment, preparation, images.classes, what, labels)


# What folders of parts are called, and classes hardly ever.
_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "test", "testing", "held_out")


def is_divided(root: Path) -> bool:
    """Whether a folder has the folders `train` and `val`; else its folders are classes.

    Raises:
        DataError: it has folders for parts that are called otherwise, or one of them only.
    """
    names = folders_in(root)
    if {"train", "val"} <= set(names):
        return True
    parts = [name for name in names if name.lower() in _TRAIN + _HELD_OUT]
    if not parts:
        return False
    raise DataError(
        f"{str(root)!r} is not divided into images to train on and images held out.",
        expected=f"folders {str(root / 'train' / 'CLASS')!r} and {str(root / 'val' / 'CLASS')!r}"
        f" for each class, or {str(root / 'CLASS')!r}",
        found=f"the folders {quoted(names)}",
        next_step="Rename the folder of images held out to 'val' (and the other to 'train'), or"
        f" train on one part, of which a fifth is held out: {str(root / parts[0])!r}.",
    )


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


def _nothing(directory: Path, problem: str) -> DataError:
    return DataError(
        f"no images to be found in {str(directory)!r}.",
        expected="one folder per class with images in it, e.g. "
        f"{str(directory / 'cat' / '1.jpg')!r}",
        found=problem,
        next_step="Set data.root to the directory that holds 'train' and 'val', or the folders of"
        " all classes; a class without training images can only be left out.",
    )
