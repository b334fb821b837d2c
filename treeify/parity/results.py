"""What is known of each model: one JSON line a model, in a file that survives interruptions.

Lines are only ever appended, each in one write. A line cut off by a power cut or a full disk is
left where it is and ignored, so nothing after it is lost; the last line of a model counts.
"""

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treeify import files
from treeify.errors import DataError
from treeify.models.versions import MODEL_LIBRARIES, versions_of

SHIPPED = Path(__file__).with_name("coverage.jsonl.xz")
FULL, REDUCED, META = "full", "reduced", "meta"


class Row(BaseModel):
    """What one check of one model found; what was not reached is None or empty.

    Args:
        name: the model's, as `treeify convert` takes it.
        versions: of treeify and the libraries.
        asked: the splits asked for.
        family: the library's module that defines it.
        network: its class.
        parameters: of the model as it is usually built.
        macs: multiply-accumulates per image of the size it is usually fed.
        how: with what numbers were checked: the model in `full`, one that these arguments made
            shallower (`reduced:...`), or none (`meta`). What is not `full` was converted as it is
            usually built and fed, and its shapes were checked, on the meta device.
        memory: bytes the check was given.
        estimate: bytes the check of the full model was estimated to need.
        least: bytes a check with the fewest blocks was estimated to need; only where it is `meta`.
        arguments: what the builder was given for the check.
        input: shape of one image of the check, `(C, H, W)`.
        splits: of the model, each with its fanout.
        fanouts: children per split.
        inner_split: where it was split once more, by name inside a module; None if it cannot be.
        shallower_splits: of the shallower model; empty where it is not `reduced`.
        shallower_inner_split: where the shallower model was split once more.
        packed_fraction: fraction of the branches' MACs that runs packed; `packed_share` in files.
        reasons: why nodes run per branch, with how many nodes each concerns.
        deviations: the largest of each check, as multiples of the tolerance: at most 1 passes.
        dtypes: the precision each check was decided in.
        ungraded: how many parameters receive no gradient, in the base architecture neither.
        export: why the checked ensemble cannot be exported; "" where its export was proven, None
            where that was not asked or a check failed before.
        seconds: that it took, tries that ran out of memory included.
        peak_memory: bytes the last try's process held at most.
        failure: what stopped the check; None where all of it passed.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True
    )

    name: str
    versions: dict[str, str]
    asked: str
    family: str | None = None
    network: str | None = None
    parameters: int | None = None
    macs: int | None = None
    how: str | None = None
    memory: int | None = None
    estimate: int | None = None
    least: int | None = None
    arguments: dict[str, object] = {}
    input: tuple[int, ...] = ()
    splits: tuple[str, ...] = ()
    fanouts: tuple[int, ...] = ()
    inner_split: str | None = None
    shallower_splits: tuple[str, ...] = ()
    shallower_inner_split: str | None = None
    packed_fraction: float | None = Field(None, alias="packed_share")
    reasons: dict[str, int] = {}
    deviations: dict[str, float] = {}
    dtypes: dict[str, str] = {}
    ungraded: int | None = None
    export: str | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    failure: str | None = None

    @property
    def converted(self) -> bool:
        """Whether the model itself became an ensemble, whatever the checks found then."""
        return self.packed_fraction is not None

    @property
    def proven(self) -> bool:
        """Whether every check passed with numbers, of the full or the shallower model."""
        return self.failure is None and self.how != META and bool(self.deviations)

    @property
    def unfit(self) -> bool:
        """Whether a check failed, or the export where it was tried."""
        return self.failure is not None or (bool(self.export) and self.how != META)

    @property
    def worst(self) -> float | None:
        """The largest deviation of all checks, in multiples of the tolerance."""
        return max(self.deviations.values(), default=None)

    @property
    def shortage(self) -> str | None:
        """Why only shapes were checked; None if more was, or that is not known."""
        if self.memory is None or self.estimate is None or self.least is None:
            return None
        reason = f"checking numbers takes about {gigabytes(self.estimate)}"
        if self.least < self.estimate:
            reason += f", with as few blocks as it runs with {gigabytes(self.least)}"
        end = "there were" if self.memory < self.least else "it ran out of"
        return f"{reason}; {end} {gigabytes(self.memory)}"

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a check another one: the model, the versions and the splits asked for."""
        return self.name, tuple(sorted(self.versions.items())), self.asked


@dataclass(frozen=True)
class Coverage:
    """The rows of a file.

    Args:
        rows: the last of each model under the same versions and splits, in order of that line.
        damaged: how many lines were cut off.
    """

    rows: tuple[Row, ...]
    damaged: int = 0

    def present(self, asked: str) -> list[Row]:
        """The rows of the installed versions and some splits."""
        return [row for row in self.rows if row.versions == versions() and row.asked == asked]

    def newest(self) -> dict[str, Row]:
        """One row a model, the last of any versions and splits, by name."""
        return {row.name: row for row in self.rows}


def gigabytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.3g} GB"


def versions() -> dict[str, str]:
    """The versions a row belongs to."""
    return versions_of("treeify", *MODEL_LIBRARIES)


def read(path: Path) -> Coverage:
    """The rows in a file of JSON lines; `.xz` files are compressed.

    Raises:
        DataError: the file is missing, cannot be read, or holds something else.
    """
    try:
        files.check_regular(path)
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (OSError, lzma.LZMAError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", expected="lines that treeify verify wrote"
        ) from error
    rows: dict[object, Row] = {}
    damaged = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise DataError(
                    f"{path}:{number} is no row of a coverage file: {error.errors()[0]['msg']}"
                    f" ({'.'.join(map(str, error.errors()[0]['loc']))}).",
                    expected="lines that treeify verify wrote",
                ) from error
            damaged += 1
            continue
        rows.pop(row.key, None)
        rows[row.key] = row
    return Coverage(tuple(rows.values()), damaged)


def shipped() -> Coverage:
    """The rows that come with this version of treeify; none where the file was left out."""
    return read(SHIPPED) if SHIPPED.is_file() else Coverage(())


def append(path: Path, row: Row) -> None:
    """Add a row in one write, on the disk when this returns; DataError if it cannot be written."""
    try:
        files.append_line(path, row.model_dump_json(by_alias=True, exclude_defaults=True))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def check_writable(path: Path) -> None:
    """Raise DataError unless rows can be appended to a file; one that is not there is made."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}", next_step="Give another --output."
        ) from error


def compressed(rows: Iterable[Row]) -> bytes:
    """A compressed file of the rows, the same for the same rows."""
    lines = sorted(row.model_dump_json(by_alias=True, exclude_defaults=True) + "\n" for row in rows)
    return lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
