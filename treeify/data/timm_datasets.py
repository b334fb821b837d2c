"""Data sets that timm reads by index: folders, tar files and Hugging Face's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from treeify import files
from treeify.arguments import as_path, require_type
from treeify.data.augmentation import ResizedCrop
from treeify.data.conventions import of_files
from treeify.data.data_set import Data, in_parts, register
from treeify.data.folders import require_no_circles
from treeify.data.image_files import UnreadableImageError, is_visible, open_image, upright
from treeify.data.image_folders import check_numbered
from treeify.data.tar_images import TarImages, folders_in_tar
from treeify.errors import DataError, quoted
from treeify.registry import Channels, Crop, FilePath, Fraction, ImageSize, Numbers, PathOrName


@register("timm")
def timm_dataset(
    *,
    dataset: str = "",
    root: FilePath = "data",
    train_split: str = "train",
    held_out_split: str = "validation",
    class_map: PathOrName | None = None,
    download: bool = False,
    size: ImageSize = 224,
    like: str | None = None,
    channels: Channels | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    crop_pct: Crop | None = None,
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
        class_map: file that numbers the classes, by its path or in `root`.
        download: fetch what is missing, where timm can.
        size: height and width in pixels, `[H, W]` if they differ.
        like: timm or torchvision name of the model whose trained weights are used.
        channels: 1 for grey, 3 for colour, 4 with opacity; null is as many as the model takes.
        mean: of each channel, pixels in 0 to 1, or one for all; instead of those of `like`.
        std: the same; with `mean`.
        crop_pct: fraction of the resized image that the held-out images' centre crop keeps, 1.0 to
            crop nothing of a square; instead of that of `like`, or 0.875.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`.
        random_erasing: probability of blanking a rectangle.

    Returns:
        As many classes as the data set has.

    Raises:
        DataError: it cannot be read by index or does not exist, or its parts have different
            classes.
    """
    names = {"dataset": dataset, "train_split": train_split, "held_out_split": held_out_split}
    for key, name in names.items():
        require_type(key, name, str, "a name", error=DataError)
    options = {"class_map": class_map, "download": download}
    folder = as_path("root", root, DataError)
    numbered = None if dataset or class_map is None else _class_map(class_map, folder)
    train, classes = _timm_part(dataset, folder, train_split, options, numbered)
    held_out, others = _timm_part(dataset, folder, held_out_split, options, classes)
    if not dataset and _root(train) == _root(held_out):
        raise DataError(
            f"{root!r} has no parts {train_split!r} and {held_out_split!r}.",
            expected="folders or tar files of these names: what is held out is not trained on",
            next_step="Set train_split and held_out_split to the names of the parts.",
        )
    if classes != others:
        raise DataError(
            f"{train_split!r} and {held_out_split!r} of {dataset or root!r} differ in classes.",
            expected=f"the same in both: {quoted(classes)}",
            found=quoted(others),
            next_step="Give a class_map.",
        )
    preparation = of_files(
        size,
        like=like,
        channels=channels,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        source="held-out images of timm",
    )
    augment = ResizedCrop(preparation, flip, auto_augment, random_erasing)
    what = f"images of {held_out_split!r}"
    labels = _labels(held_out)
    return in_parts(train, held_out, augment, preparation, classes, what, labels)


class _TimmImages(Dataset[Any]):
    """The opened images of a timm data set and their classes; timm passes over damaged images."""

    def __init__(self, dataset: Any) -> None:
        # A reader gives files; without one, torchvision gives images.
        self.dataset, self.reader = dataset, getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self.reader is None:
            try:
                image, label = self.dataset[index]
                return upright(image), int(label)
            except Exception as error:  # a damaged image makes decoders raise anything
                raise UnreadableImageError(f"image {index}", error) from error
        if isinstance(self.reader, ReaderImageFolder):
            path, label = self.reader.samples[index]
            return open_image(path), int(label)
        try:
            file, label, *_ = self.reader[index]
            with file:
                return open_image(file), int(label)
        except (OSError, UnreadableImageError) as error:
            reason = error.reason if isinstance(error, UnreadableImageError) else error
            raise UnreadableImageError(self._name(index), reason) from error

    def _name(self, index: int) -> str:
        return str(self.dataset.filename(index, absolute=True))


def _class_map(file: str, root: Path) -> list[str]:
    """The classes that a file names, in the order of their numbers."""
    path = as_path("class_map", file, DataError)
    path = path if path.exists() else root / path
    try:
        files.check_regular(path)
        if path.suffix.lower() == ".pkl":  # timm would run what is in it
            raise ValueError("it is a pickle, which may hold code")
        numbers = load_class_map(str(path))  # type: ignore[no-untyped-call]
    except (AssertionError, OSError, ValueError) as error:
        raise DataError(
            f"class_map {file!r} cannot be read.",
            expected="a text file, one class a line, by its path or in data.root",
            found=str(error),
        ) from error
    # timm keeps the mark that some editors begin a file with.
    return [str(name).lstrip("\ufeff") for name in sorted(numbers, key=numbers.__getitem__)]


def _number(reader: ReaderImageFolder, numbered: Sequence[str] | None) -> None:
    """Number the classes of folders as `image_folder` does, or as they are numbered elsewhere.

    timm itself sorts 2 before 10, takes hidden folders for classes, and leaves out folders that a
    class map does not name.
    """
    names = {number: name for name, number in reader.class_to_idx.items()}
    samples = [
        (path, names[number])
        for path, number in reader.samples
        if is_visible(Path(path).relative_to(reader.root).as_posix())
    ]
    present = sorted({name for _, name in samples})
    if numbered is not None:
        check_numbered(present, numbered, str(reader.root))
    classes = {name: index for index, name in enumerate(numbered or present)}
    reader.class_to_idx = classes
    reader.samples = [(path, classes[name]) for path, name in samples]


def _labels(part: Any) -> list[int] | None:
    """The classes of a part's images, where they are known without opening them."""
    if isinstance(part, TarImages):
        return [entry.label for entry in part.entries]
    if isinstance(part.reader, ReaderImageFolder):
        return [number for _, number in part.reader.samples]
    return None


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
    dataset: str,
    root: Path,
    split: str,
    options: Mapping[str, Any],
    numbered: Sequence[str] | None,
) -> tuple[Any, tuple[str, ...]]:
    """The images of one split and the names of its classes, numbered as is said, if it is."""
    tar = root / f"{split}.tar"
    if not dataset and files.is_file(tar):
        return folders_in_tar(tar, numbered)
    if not dataset:
        require_no_circles(root)
    if dataset.split("/")[0] in ("wds", "tfds", "hfids"):
        raise DataError(
            f"{dataset!r} is a stream.",
            expected="a data set that is read by index: folders, tar files, hfds/..., torch/...",
            next_step="WebDataset's shards are read by index too: data.name=webdataset.",
        )
    if not dataset or options["class_map"] is None:
        options = {"download": options["download"]}
    try:
        reading = create_dataset(dataset, str(root), split=split, is_training=False, **options)
        images = _TimmImages(reading)
        if isinstance(images.reader, ReaderImageFolder):
            _number(images.reader, numbered)
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
