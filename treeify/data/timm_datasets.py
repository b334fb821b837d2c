"""Data sets that timm reads by index: folders, tar files and Hugging Face's."""

from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import PositiveInt
from timm.data import create_dataset
from torch.utils.data import Dataset

from treeify.data.data_set import Data, UnreadableImageError, in_parts, register
from treeify.data.preparation import timm_transforms
from treeify.data.tar_images import folders_in
from treeify.errors import DataError
from treeify.registry import Fraction


@register("timm")
def timm_dataset(
    *,
    dataset: str = "",
    root: str = "data",
    train_split: str = "train",
    held_out_split: str = "validation",
    class_map: str | None = None,
    download: bool = False,
    size: PositiveInt = 224,
    like: str | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: Fraction = 0.0,
) -> Data:
    """Whatever `timm.data.create_dataset` reads by index: folders, tar files, Hugging Face's.

    Streams (`wds/`, `tfds/`, `hfids/`) are refused: a run that is resumed could not find its place.

    Args:
        dataset: timm's name: empty for folders and tar files, `hfds/...` (after `pip install
            datasets`), `torch/...` for torchvision's.
        root: directory of the data, or of `train.tar` and `validation.tar` with a folder per class.
        train_split: what is trained on.
        held_out_split: what is held out.
        class_map: file that numbers the classes.
        download: fetch what is missing, where timm can.
        size: height and width in pixels.
        like: timm or torchvision name of the model whose trained weights are used.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`.
        random_erasing: probability of blanking a rectangle.

    Returns:
        As many classes as the data set has.

    Raises:
        DataError: it cannot be read by index or does not exist, or its parts have different
            classes.
    """
    (train, classes), (held_out, others) = (
        _timm_part(dataset, Path(root), split, class_map, download)
        for split in (train_split, held_out_split)
    )
    if not dataset and _root(train) == _root(held_out):
        raise DataError(
            f"{root!r} has no parts {train_split!r} and {held_out_split!r}.",
            expected="folders or tar files of these names: what is held out is not trained on",
            next_step="Set train_split and held_out_split to the names of the parts.",
        )
    if classes != others:
        raise DataError(
            f"{train_split!r} and {held_out_split!r} of {dataset or root!r} differ in classes.",
            expected="the same in both",
            found=f"{len(classes)} and {len(others)}",
            next_step="Give a class_map.",
        )
    crop, fit = timm_transforms(size, like, flip, auto_augment, random_erasing)
    return in_parts(train, held_out, crop, fit, classes, f"images of {held_out_split!r}")


class _TimmImages(Dataset[Any]):
    """The images of a timm data set and their classes; timm passes over damaged images."""

    def __init__(self, dataset: Any) -> None:
        # A reader gives files; without one, torchvision gives images.
        self.dataset, self.reader = dataset, getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self.reader is None:
            image, label = self.dataset[index]
            return image.convert("RGB"), int(label)
        try:
            file, label, *_ = self.reader[index]
            with file:
                return Image.open(file).convert("RGB"), int(label)
        except OSError as error:
            name = str(self.reader.filename(index, absolute=True))
            raise UnreadableImageError(name, error) from error


def _classes(source: Any) -> tuple[str, ...]:
    """The names of the classes in the order of their numbers."""
    numbered = getattr(source, "class_to_idx", None)
    if numbered:
        return tuple(str(name) for name in sorted(numbered, key=numbered.__getitem__))
    features = getattr(getattr(source, "dataset", None), "features", {})
    names = next((kind.names for kind in features.values() if hasattr(kind, "names")), None)
    if names is None:
        raise DataError(
            "the data set does not say how many classes it has.",
            next_step="Give a class_map, or write a data set of your own (docs/recipes.md).",
        )
    return tuple(map(str, names))


def _timm_part(
    dataset: str, root: Path, split: str, class_map: str | None, download: bool
) -> tuple[Any, tuple[str, ...]]:
    """The images of one split and the names of its classes."""
    tar = root / f"{split}.tar"
    if not dataset and tar.is_file():
        return folders_in(tar)
    if dataset.split("/")[0] in ("wds", "tfds", "hfids"):
        raise DataError(
            f"{dataset!r} is a stream.",
            expected="a data set that is read by index: folders, tar files, hfds/..., torch/...",
            next_step="WebDataset's shards are read by index too: data.name=webdataset.",
        )
    options: dict[str, Any] = {"split": split, "is_training": False, "download": download}
    if class_map:
        options["class_map"] = class_map
    try:
        images = _TimmImages(create_dataset(dataset, str(root), **options))
        return images, _classes(images.dataset if images.reader is None else images.reader)
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError) as error:
        raise DataError(
            f"the split {split!r} of {dataset or str(root)!r} cannot be read.",
            expected="what timm.data.create_dataset reads",
            found=f"{type(error).__name__}: {error}",
            next_step="Set data.root, data.dataset and the names of the splits.",
        ) from error


def _root(part: Any) -> object:
    """Where timm found a part's folders; a tar file is a part by itself."""
    return getattr(getattr(part, "reader", part), "root", part)
