"""What an export in 8 bits costs and gains, size by size, beside the one in float32."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from treeify.deploy.runtime import Anytime, Array

_ROUNDS, _SECONDS = 31, 4.0


@dataclass(frozen=True)
class Measured:
    """One export up to a size.

    Args:
        bytes: of its files.
        seconds: of an answer, all steps together; medians.
        accuracy: of the mean logits, 0 to 1; None without labels.
    """

    bytes: int
    seconds: float
    accuracy: float | None


@dataclass(frozen=True)
class Row:
    """Both exports up to a size.

    Args:
        leaves: the size.
        float32: before.
        int8: after.
        agreement: fraction of images for which both find the same class the likeliest.
        largest_difference: of a leaf's logits, in fractions of the largest one.
    """

    leaves: int
    float32: Measured
    int8: Measured
    agreement: float
    largest_difference: float


@dataclass(frozen=True)
class QuantisationReport:
    """An export before and after it was quantised.

    Args:
        rows: one for each size.
        scheme: how it was quantised.
        images: how many were compared.
        held_out: whether those were others than calibrated on.
        batch: images of an answer that was timed.
        vnni: whether this processor has instructions for products of 8 bits.
    """

    rows: tuple[Row, ...]
    scheme: str
    images: int
    held_out: bool
    batch: int
    vnni: bool

    @property
    def ratio(self) -> float:
        """How many times as fast all steps together are in 8 bits."""
        return self.rows[-1].float32.seconds / self.rows[-1].int8.seconds

    @property
    def verdict(self) -> str:
        """What was gained, in a sentence."""
        before, after = self.rows[-1].float32.bytes, self.rows[-1].int8.bytes
        text = f"{before / after:.1f} times smaller" if after < before else "not smaller"
        if not self.vnni:
            return f"{text}, not faster: this processor has no VNNI."
        if self.ratio > 1.05:
            return f"{text}, {self.ratio:.2f} times as fast on this processor."
        return f"{text}, not faster: {self.ratio:.2f} times as fast on this processor."

    def table(self) -> list[list[str]]:
        """A table: megabytes, milliseconds, and accuracy in % where labels were given."""
        labelled = self.rows[0].int8.accuracy is not None
        quality = ["accuracy %", "int8"] if labelled else []
        lines = [["leaves", "MB", "int8", "ms", "int8", *quality, "same class %", "difference"]]
        for row in self.rows:
            pair = (row.float32, row.int8)
            cells = [f"{each.bytes / 1e6:.2f}" for each in pair]
            cells += [f"{1e3 * each.seconds:.2f}" for each in pair]
            cells += [f"{100 * each.accuracy:.2f}" for each in pair if each.accuracy is not None]
            cells += [f"{100 * row.agreement:.2f}", f"{row.largest_difference:.1e}"]
            lines.append([str(row.leaves), *cells])
        return lines

    def __str__(self) -> str:
        """The table, what it was measured on, and the verdict."""
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        images = "held-out images" if self.held_out else "of the images calibrated on"
        caption = (
            f"up to each size, float32 and int8; ms for {self.batch} at a time, one thread;"
            f" the rest by {self.images} {images}; difference: of the largest logit"
        )
        return "\n".join([self.scheme, *lines, caption, self.verdict])


@dataclass(frozen=True)
class Comparison:
    """What exports are compared with.

    Args:
        images: `[N, C, H, W]`.
        labels: their classes, `[N]`, or None.
        held_out: whether they are others than those calibrated on.
    """

    images: Array
    labels: Array | None = None
    held_out: bool = False


def compare_quantised(
    before: Anytime, after: Anytime, data: Comparison, *, scheme: str, vnni: bool
) -> QuantisationReport:
    """Run an export and its quantised form beside each other."""
    sizes = before.sizes
    same, right = np.zeros(len(sizes)), np.zeros((2, len(sizes)))
    differences, largest = np.zeros(len(sizes)), np.zeros(len(sizes))
    for rows, images in batches(data.images, batch_of(before)):
        sessions = before.session(images), after.session(images)
        count = len(rows)
        for index, size in enumerate(sizes):
            logits = [first_array(each.advance(to=size).logits)[:count] for each in sessions]
            classes = [_classes(each) for each in logits]
            same[index] += np.mean(classes[0] == classes[1]) * count
            leaves = [first_array(each.leaf_logits)[:count].astype(float) for each in sessions]
            differences[index] = max(differences[index], np.abs(leaves[1] - leaves[0]).max())
            largest[index] = max(largest[index], np.abs(leaves[0]).max())
            if data.labels is not None:
                for chain in (0, 1):
                    right[chain, index] += np.sum(classes[chain] == data.labels[rows])
    total = len(data.images)
    batch = batch_of(before, dynamic=1)
    seconds = _seconds((before, after), next(batches(data.images, batch))[1])
    measured = [
        [
            Measured(size, time, None if data.labels is None else float(count / total))
            for size, time, count in zip(_bytes(model), times, counts, strict=True)
        ]
        for model, times, counts in zip((before, after), seconds, right, strict=True)
    ]
    relative = differences / np.where(largest > 0, largest, 1)
    rows_ = zip(sizes, *measured, same / total, relative, strict=True)
    return QuantisationReport(
        tuple(Row(n, one, two, float(a), float(d)) for n, one, two, a, d in rows_),
        scheme,
        total,
        data.held_out,
        batch,
        vnni,
    )


def batch_of(model: Anytime, dynamic: int = 16) -> int:
    """How many images a model answers at a time."""
    batch = model.shape[0]
    return batch if isinstance(batch, int) else dynamic


def batches(images: Array, size: int) -> Iterator[tuple[Array, Array]]:
    """Images in batches, each with its positions; a last one that is smaller is filled up."""
    for start in range(0, len(images), size):
        rows = np.arange(start, min(start + size, len(images)))
        yield rows, images[np.resize(rows, size)]


def first_array(value: Any) -> Array:
    """The first array of a model's output."""
    while not hasattr(value, "dtype"):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    array: Array = value
    return array


def _classes(logits: Array) -> Array:
    """The likeliest class; of what is no logits, the value."""
    return logits.argmax(1) if logits.ndim > 1 and logits.dtype.kind == "f" else logits


def _bytes(model: Anytime) -> list[int]:
    sizes = [step["bytes"] for step in model.manifest["steps"]]
    return np.cumsum(sizes).tolist()  # type: ignore[no-any-return]


def _seconds(models: tuple[Anytime, Anytime], images: Array) -> list[list[float]]:
    """Seconds up to each size, of models that take turns: the steps' medians, added.

    Of all steps together more runs are interrupted, where other programs want the processor too.
    """
    times: list[list[list[float]]] = [[], []]
    runs: list[Callable[[], list[float]]] = [
        lambda model=model: [answer.elapsed for answer in model.anytime(images)]  # type: ignore[misc]
        for model in models
    ]
    for run in runs:
        run()
    begin = perf_counter()
    while len(times[1]) < _ROUNDS and (len(times[1]) < 3 or perf_counter() - begin < _SECONDS):
        for run, rows in zip(runs, times, strict=True):
            rows.append(run())
    steps = [np.median(np.diff(rows, axis=1, prepend=0), axis=0) for rows in times]
    return [np.cumsum(each).tolist() for each in steps]
