"""Which class every nested sub-ensemble names: accuracy class by class, and confusion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from treeify.arguments import require_integer, require_type
from treeify.errors import InputError
from treeify.evaluation.metrics import require_answers, require_labels, require_some
from treeify.losses import nested_logits
from treeify.tree import Tree


@dataclass(frozen=True)
class ClassScore:
    """How often the images of one class are recognised.

    Args:
        index: number of the class, from 0.
        images: how many are of it.
        accuracy: those whose class has the largest mean logit, in percent, one per nested size;
            None where there is no image of the class.
    """

    index: int
    images: int
    accuracy: tuple[float, ...] | None


def confusion_matrix(labels: Tensor, named: Tensor, classes: int) -> Tensor:
    """How many images of each true class are named each class.

    Args:
        labels: their true classes, [N].
        named: what they are named, [N].
        classes: how many there are, `K`.

    Returns:
        Counts [K, K]: a row for each true class, a column for each named class.
    """
    pairs = labels * classes + named
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def confused_pairs(labels: Tensor, named: Tensor, classes: int) -> dict[tuple[int, int], int]:
    """How many images of a class are named another one, in memory that classes do not add to.

    Args:
        labels: their true classes, [N].
        named: what they are named, [N].
        classes: how many there are.

    Returns:
        Counts by true and named class, of the pairs that occur.
    """
    wrong = labels != named
    codes, counts = torch.unique(labels[wrong] * classes + named[wrong], return_counts=True)
    pairs = (divmod(code, classes) for code in codes.tolist())
    return dict(zip(pairs, counts.tolist(), strict=True))


def per_class(labels: Tensor, named: Tensor, classes: int) -> tuple[ClassScore, ...]:
    """The accuracy of every nested size on the images of each class.

    Args:
        labels: their true classes, [N].
        named: what every size names them, [N, S].
        classes: how many there are.
    """
    images = torch.bincount(labels, minlength=classes)
    correct = torch.zeros(classes, named.shape[1], dtype=torch.double)
    correct.index_add_(0, labels, (named == labels[:, None]).double())
    percent = (100 * correct / images[:, None]).tolist()
    return tuple(
        ClassScore(index, count, tuple(accuracies) if count else None)
        for index, (count, accuracies) in enumerate(zip(images.tolist(), percent, strict=True))
    )


class NamedClasses:
    """The class that every nested sub-ensemble names for each image, gathered over batches.

    Args:
        tree: the shape the leaves belong to.
        classes: how many there are, `K`.

    Raises:
        InputError: it is no tree, or there is no class.
    """

    def __init__(self, tree: Tree, classes: int) -> None:
        require_type("tree", tree, Tree, "a tree, such as hne.tree")
        require_integer("the number of classes", classes, 1)
        self.tree = tree
        self.classes = classes
        self._named: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits: Tensor, target: Tensor) -> Tensor:
        """Observe a batch of leaf logits [N, L, K] with classes [N].

        Returns:
            The class that every nested size names for each image of the batch, `[N, S]`.

        Raises:
            DataError: a class is out of range.
            InputError: they do not fit each other, the tree or the number of classes.
        """
        require_answers(logits, target, self.tree)
        if logits.shape[-1] != self.classes:
            raise InputError(
                "the answers are of other classes.",
                expected=f"{self.classes} logits of each leaf",
                found=f"{logits.shape[-1]}",
                next_step="Give the number of classes that the leaves have logits for.",
            )
        require_labels(target, self.classes)
        nested = nested_logits(logits.detach().float(), self.tree)
        named = nested.argmax(-1).cpu()
        self._named.append(named)
        self._labels.append(target.long().cpu())
        return named

    def add_batch(self, images: Tensor, logits: Tensor, target: Tensor) -> None:
        """The same, as whoever measures calls an observer: with the images [N, C, H, W], too."""
        self.add(logits, target)

    @property
    def images(self) -> int:
        """How many were added."""
        return sum(map(len, self._labels))

    @property
    def labels(self) -> Tensor:
        """The true class of every image so far, `[N]`, in the order they were added.

        Raises:
            DataError: there is no image.
        """
        require_some(self.images)
        return torch.cat(self._labels)

    @property
    def named(self) -> Tensor:
        """The class that every nested size names for each of them, `[N, S]`.

        Raises:
            DataError: there is no image.
        """
        require_some(self.images)
        return torch.cat(self._named)

    def confusion(self, leaves: int | None = None) -> Tensor:
        """How many images of each true class are named each class.

        Args:
            leaves: a nested size; all leaves by default.

        Returns:
            Counts [K, K]: a row for each true class, a column for each named class.

        Raises:
            DataError: there is no image.
            InputError: this is no nested size.
        """
        return confusion_matrix(self.labels, self.named[:, self._index(leaves)], self.classes)

    def per_class(self) -> tuple[ClassScore, ...]:
        """The accuracy of every nested size on the images of each class.

        Raises:
            DataError: there is no image.
        """
        return per_class(self.labels, self.named, self.classes)

    def _index(self, leaves: int | None) -> int:
        sizes = self.tree.nested_sizes
        if leaves is None:
            return len(sizes) - 1
        if leaves not in sizes:
            raise InputError(
                f"there is no nested size of {leaves!r} leaves.",
                expected=f"one of {', '.join(map(str, sizes))}",
                next_step="Pass one of them, or none for all leaves.",
            )
        return sizes.index(leaves)
