"""What is known of a run, an ensemble, an export or a grid: plain values, None where nothing is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from treeify.anytime.confidence import Budget
from treeify.evaluation.comparison import Gain
from treeify.evaluation.cost import Cost
from treeify.evaluation.metrics import Score
from treeify.training.events import Epoch

Kind = Literal["run", "ensemble", "export"]


@dataclass(frozen=True)
class Level:
    """A level of the tree.

    Args:
        number: from 0, at the input.
        split: the module before which it begins; None for the first level.
        branches: how many there are.
        macs: of one branch, per image.
        parameters: of all branches.
        size: of all their parameters and buffers, in bytes.
        execution: how it runs: packed or looped.
        packed: fraction of its MACs in operations with a rule for packed tensors, 0 to 1.
    """

    number: int
    split: str | None
    branches: int
    macs: int | None = None
    parameters: int | None = None
    size: int | None = None
    execution: str | None = None
    packed: float | None = None


@dataclass(frozen=True)
class ExportedStep:
    """A file of an export: from how many leaves to how many, what it costs, and its parity.

    `difference` is the largest of a leaf's logits from PyTorch's, in fractions of the largest
    logit; None where they were not compared.
    """

    file: str
    start: int
    leaves: int
    macs: int
    parameters: int
    size: int
    difference: float | None


@dataclass(frozen=True)
class Transition:
    """Seconds from some leaves straight to more: the median and the 99th percentile.

    A deadline is kept if the median times the margin fits into what is left of it.
    """

    start: int
    stop: int
    typical: float
    slow: float
    margin: float


@dataclass(frozen=True)
class LatencyTable:
    """What `treeify calibrate` measured for one situation.

    Args:
        situation: the images' shape and type, one phrase.
        batch: how many images were answered together, whose seconds these are.
        machine: that it was measured on, with what answers.
        plan: how the ensemble ran.
        transitions: between sizes.
        repeats: how many rounds were measured.
    """

    situation: str
    batch: int
    machine: str
    plan: str
    transitions: tuple[Transition, ...]
    repeats: int


@dataclass(frozen=True)
class Thumbnail:
    """An image whose answer a size changed: a data URL, and the names of three classes."""

    url: str
    target: str
    before: str
    after: str
    size: int


@dataclass(frozen=True)
class Answers:
    """What every nested size answers to the held-out images, in one pass over them.

    Args:
        split: which images are held out, one phrase.
        preparation: what they went through; None if that is not known.
        classes: their names, `K`.
        target: the images' classes, `[N]`.
        nested: the class that each size names, `[S, N]`.
        confidence: its probability, `[S, N]`.
        scores: of each size.
        gains: of each size over one leaf.
        leaf_accuracy: of every leaf by itself, in percent.
        base: the score of the base model, if its weights are known.
        thumbnails: some of the images whose answers a size changed.
        skipped: images that could not be read.
    """

    split: str
    preparation: str | None
    classes: tuple[str, ...]
    target: Tensor
    nested: Tensor
    confidence: Tensor
    scores: tuple[Score, ...]
    gains: tuple[Gain, ...]
    leaf_accuracy: tuple[float, ...]
    base: Score | None = None
    thumbnails: tuple[Thumbnail, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Times:
    """Seconds of an answer for one image by number of leaves, 0 for the base model."""

    seconds: Mapping[int, float]
    machine: str


@dataclass(frozen=True)
class Conversion:
    """How a conversion went: see `treeify.conversion.report.Conversion`."""

    packed_fraction: float
    fallbacks: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What is known of one directory.

    Args:
        name: of it on the page, unique there.
        path: as the user named it.
        kind: what it is.
        data_set: the name of the data set it was measured on, if known.
        sizes: the nested sizes' costs, increasing.
        base: what the base model costs.
        levels: of its tree.
        steps: of an export.
        answers: to the held-out images.
        times: of answers on this machine.
        epochs: of a run, as it wrote them down.
        rates: the learning rate at the end of each of these.
        latencies: as calibrated.
        budgets: thresholds that were chosen, with what they gave.
        conversion: how each node runs.
        parity: the largest deviations from the untouched base architecture, in multiples of the
            tolerance, by what was compared.
        origin: where it comes from, words by what they say.
        recipe: of a run, as YAML.
        missing: reasons why something is not known, by field.
    """

    name: str
    path: Path
    kind: Kind
    sizes: tuple[Cost, ...]
    data_set: str | None = None
    base: Cost | None = None
    levels: tuple[Level, ...] = ()
    steps: tuple[ExportedStep, ...] = ()
    answers: Answers | None = None
    times: Times | None = None
    epochs: tuple[Epoch, ...] = ()
    rates: tuple[float, ...] = ()
    latencies: tuple[LatencyTable, ...] = ()
    budgets: tuple[Budget, ...] = ()
    conversion: Conversion | None = None
    parity: Mapping[str, float] | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    recipe: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def scores(self) -> tuple[Score, ...]:
        """Of the nested sizes: as measured here, else as the run's last epoch wrote them down."""
        if self.answers is not None:
            return self.answers.scores
        return self.epochs[-1].held_out if self.epochs else ()


@dataclass(frozen=True)
class SeedRun:
    """A run of a grid: its last scores, and its epochs if its directory is there."""

    seed: int
    held_out: tuple[Score, ...]
    train: tuple[Score, ...]
    epochs: tuple[Epoch, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A row of a grid: its runs, and what its nested sizes cost if one of them is there."""

    name: str
    runs: tuple[SeedRun, ...]
    sizes: tuple[Cost, ...] = ()


@dataclass(frozen=True)
class GridResult:
    """What `treeify ablate` left behind."""

    name: str
    path: Path
    variants: tuple[Variant, ...]
    data_set: str | None = None
    base: Cost | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
