"""Points of other anytime models as they were printed, by data set, each with its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from treeify.errors import DataError

FILE = Path(__file__).with_name("published.yaml")

Kind = Literal["printed", "digitised"]
Setting = Literal["anytime", "budgeted"]


@dataclass(frozen=True)
class Series:
    """What one model was printed to reach on a data set.

    Args:
        name: of the model.
        data_set: as recipes name it.
        kind: numbers were printed, or digitised: read off the pixels of a plot.
        setting: anytime, where every image goes as far as a point says, or budgeted, where images
            stop by confidence and MACs are their mean.
        source: paper, venue, year, and the place in it.
        link: to the paper.
        macs_are: who counted the MACs, and how.
        points: MACs per image, increasing, and accuracy in percent.
    """

    name: str
    data_set: str
    kind: Kind
    setting: Setting
    source: str
    link: str
    macs_are: str
    points: tuple[tuple[int, float], ...]


_Text = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Text
    data_set: Annotated[str, Field(pattern="^[a-z0-9_]+$")]
    kind: Kind
    setting: Setting
    place: _Text
    macs_are: _Text
    macs: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
    accuracy: tuple[Annotated[float, Field(ge=0, le=100)], ...]

    @model_validator(mode="after")
    def _is_a_curve(self) -> _Entry:
        if len(self.macs) != len(self.accuracy):
            raise ValueError(f"{len(self.macs)} MACs for {len(self.accuracy)} accuracies")
        if any(less >= more for less, more in pairwise(self.macs)):
            raise ValueError("MACs do not increase")
        return self


class _Paper(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    paper: _Text
    venue: _Text
    year: Annotated[int, Field(ge=2010, le=2100)]
    link: Annotated[str, Field(pattern="^https://")]
    series: Annotated[tuple[_Entry, ...], Field(min_length=1)]


_PAPERS = TypeAdapter(tuple[_Paper, ...])


def published(data_set: str, file: Path = FILE) -> list[Series]:
    """The models that were printed for a data set; none for one that nothing was found for.

    Args:
        data_set: its name, as in a recipe: cifar10, cifar100, imagenet.
        file: other points, in the form of treeify's own.

    Raises:
        DataError: the file cannot be read, or says something else or less than it should.
    """
    return [series for series in _all(file) if series.data_set == data_set]


def data_sets(file: Path = FILE) -> list[str]:
    """The data sets that there are points for; DataError as of `published`."""
    return sorted({series.data_set for series in _all(file)})


def _all(file: Path) -> Sequence[Series]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        papers = _PAPERS.validate_python(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise DataError(
            f"the published points in {file} cannot be used.",
            expected="papers with series of MACs and accuracies, each with its source",
            found=str(error),
            next_step=f"Write it as {FILE} is written.",
        ) from error
    return tuple(
        Series(
            entry.name,
            entry.data_set,
            entry.kind,
            entry.setting,
            f"{paper.paper}, {paper.venue} {paper.year}: {entry.place}",
            paper.link,
            entry.macs_are,
            tuple(zip(entry.macs, entry.accuracy, strict=True)),
        )
        for paper in papers
        for entry in paper.series
    )
