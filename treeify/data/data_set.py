"""What a data set is, and the registry that finds one by name."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from treeify.data.preparation import Transform
from treeify.errors import DataError
from treeify.registry import Registry

Examples = Dataset[Any]

SOURCES = Registry("data set")
register = SOURCES.register


class UnreadableImageError(DataError):
    """An image file is damaged; `reason` is what reading it said."""

    def __init__(self, path: str, reason: Exception | None = None) -> None:
        if reason is None:  # a loader's worker sent it: with a message that has all this
            super().__init__(path.rpartition(f"{type(self).__name__}: ")[2].strip())
        else:
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


def in_parts(
    train: Any,
    held_out: Any,
    crop: Transform,
    fit: Transform,
    classes: Sequence[str],
    what: str,
) -> Data:
    """A data set that comes in two parts.

    Training images go through `crop` and held-out images through `fit` each time they are read;
    `what` says in reports which images are held out.
    """
    split = f"the {len(held_out):,} {what} held out"
    return Data(Transformed(train, crop), Transformed(held_out, fit), tuple(classes), split)


class Transformed(Dataset[tuple[Tensor, Any]]):
    """Examples whose images go through a transform each time they are read."""

    def __init__(self, examples: Any, transform: Transform) -> None:
        self.examples = examples
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.examples[index]
        return self.transform(image), label

    def __len__(self) -> int:
        return len(self.examples)
