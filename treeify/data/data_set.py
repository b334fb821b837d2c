"""What a data set is, and the registry that finds one by name."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from treeify.data.image_files import UnreadableImageError
from treeify.data.preparation import Preparation
from treeify.errors import DataError, quoted
from treeify.registry import Registry

Examples = Dataset[Any]

SOURCES = Registry("data set")
register = SOURCES.register


@dataclass(frozen=True)
class Data:
    """A data set split into training and held-out examples.

    Args:
        train: augmented training examples, an image [C, H, W] float and its class.
        held_out: examples never trained on, without augmentation.
        classes: the classes' names, in the order of their indices; there are `K`.
        split: how the held-out examples were chosen, one phrase for reports.
        preparation: what held-out images went through, so that `treeify predict` can do the same
            with files; it gets the names of the classes. None if that is not known.

    Raises:
        DataError: the preparation names other classes.
    """

    train: Examples
    held_out: Examples
    classes: tuple[str, ...]
    split: str
    preparation: Preparation | None = None

    def __post_init__(self) -> None:
        """The classes are named once."""
        classes = tuple(map(str, self.classes))
        object.__setattr__(self, "classes", classes)
        if self.preparation is None:
            return
        if self.preparation.classes not in (None, classes):
            raise DataError(
                "a data set and its preparation name different classes.",
                expected=quoted(classes),
                found=quoted(self.preparation.classes or ()),
            )
        object.__setattr__(self, "preparation", replace(self.preparation, classes=classes))

    def example(self) -> Tensor:
        """The first held-out image that can be read, [C, H, W].

        Raises:
            DataError: there is none.
        """
        for index in range(len(self.held_out)):  # type: ignore[arg-type]
            with contextlib.suppress(UnreadableImageError):
                image: Tensor = self.held_out[index][0]
                return image
        raise DataError("none of the held-out images can be read.")

    def unaugmented(self, index: int) -> Tensor:
        """A training image as it would be if it were held out, [C, H, W], where that is known.

        A data set that augments images by itself gives them augmented.
        """
        examples = self.train
        while isinstance(examples, Renumbered):
            examples = examples.examples
        if isinstance(examples, Transformed):
            examples = examples.examples
        image = examples[index][0]
        if self.preparation is not None and isinstance(image, Image.Image):
            return self.preparation(image)
        tensor: Tensor = image
        return tensor

    def prepared_by(self, preparation: Preparation) -> "Data":
        """The same with held-out images prepared otherwise, where the data set opens files.

        A data set that prepares images by itself stays as it is.
        """
        held_out = self.held_out
        if not isinstance(held_out, Transformed) or not isinstance(held_out.transform, Preparation):
            return self
        preparation = replace(preparation, classes=self.classes)
        return replace(
            self, held_out=Transformed(held_out.examples, preparation), preparation=preparation
        )

    def numbered_by(self, classes: Sequence[str]) -> "Data":
        """The same with every class at its place in `classes`, by name; some may have no images.

        Raises:
            DataError: a class is not among them.
        """
        classes = tuple(classes)
        if classes == self.classes:
            return self
        if unknown := [name for name in self.classes if name not in classes]:
            raise DataError(
                f"the data have classes that the ensemble does not know: {quoted(unknown)}.",
                expected=f"some of {quoted(classes)}",
                found=quoted(self.classes),
                next_step="Rename or remove them, or train on these data.",
            )
        numbers = [classes.index(name) for name in self.classes]
        missing = [name for name in classes if name not in self.classes]
        preparation = self.preparation and replace(self.preparation, classes=classes)
        return Data(
            Renumbered(self.train, numbers),
            Renumbered(self.held_out, numbers),
            classes,
            self.split + none_of(missing),
            preparation,
        )


def none_of(classes: Sequence[str]) -> str:
    """What a split's phrase says of classes without held-out images."""
    return f", none of {quoted(classes)}" if classes else ""


def in_parts(
    train: Any,
    held_out: Any,
    augment: Any,
    preparation: Preparation,
    classes: Sequence[str],
    what: str,
    labels: Iterable[int] | None = None,
) -> Data:
    """A data set that comes in two parts of opened images and their classes.

    Training images go through `augment` and held-out images through `preparation` each time they
    are read; `what` says in reports which images are held out. `labels` are the held-out images'
    classes, where that is known: the report names those without any.
    """
    present = range(len(classes)) if labels is None else set(labels)
    empty = [name for index, name in enumerate(classes) if index not in present]
    split = f"the {len(held_out):,} {what} held out{none_of(empty)}"
    held_out = Transformed(held_out, preparation)
    preparation = replace(preparation, classes=tuple(classes))
    return Data(Transformed(train, augment), held_out, tuple(classes), split, preparation)


class Transformed(Dataset[tuple[Tensor, Any]]):
    """Examples whose images go through a transform each time they are read."""

    def __init__(self, examples: Any, transform: Any) -> None:
        self.examples = examples
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.examples[index]
        return self.transform(image), label

    def __len__(self) -> int:
        return len(self.examples)


class Renumbered(Dataset[tuple[Any, int]]):
    """Examples whose class `i` is called `numbers[i]`."""

    def __init__(self, examples: Any, numbers: Sequence[int]) -> None:
        self.examples = examples
        self.numbers = numbers

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.examples[index]
        return image, self.numbers[int(label)]

    def __len__(self) -> int:
        return len(self.examples)
