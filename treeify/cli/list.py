"""`treeify list`: the models that convert, and what is known of each."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from treeify.cli.options import Json, count
from treeify.cli.output import Column, print_json, say, short, table
from treeify.models.builders import TIMM, family, library_names
from treeify.parity import results
from treeify.parity.results import Row


@dataclass(frozen=True)
class _Filter:
    """What is asked for: a wildcard, a family, and limits."""

    pattern: str
    family: str | None
    parameters: int | None
    macs: int | None

    def names(self, row: Row | None, name: str) -> bool:
        """Whether a model's name and family are meant."""
        # timm's names may be given in full, as torchvision's are.
        full = self.pattern.startswith(TIMM) and not re.search("[/:]", name)
        if not fnmatchcase(TIMM + name if full else name, self.pattern):
            return False
        if self.family is None:
            return True
        module = family(name) if row is None or row.family is None else row.family
        return fnmatchcase(module, self.family)

    @property
    def limited(self) -> bool:
        """Whether a model of unknown size can be judged."""
        return self.parameters is not None or self.macs is not None

    def fits(self, row: Row) -> bool:
        """Whether the numbers are known and within the limits."""
        pairs = ((row.parameters, self.parameters), (row.macs, self.macs))
        return all(most is None or (count is not None and count <= most) for count, most in pairs)


def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Wildcard over names, e.g. 'resnet*' or 'torchvision/*'.")
    ] = "*",
    of_family: Annotated[
        str | None,
        typer.Option(
            "--family",
            help="Only models of this module of the library (wildcards too), e.g. swin_transformer"
            " or torchvision/*.",
        ),
    ] = None,
    max_params: Annotated[int | None, count("--max-params", "At most this many, e.g. 25M.")] = None,
    max_macs: Annotated[
        int | None, count("--max-macs", "At most this many an image, e.g. 4G.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--coverage", help="File of treeify verify to read; by default what treeify comes with."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models that convert, with their size and packed fraction.

    Parameters and MACs are those of the model as it is usually built and fed; the packed fraction
    is that of the ensemble that was checked. Models that were never checked are listed too, with
    nothing known; those that failed to convert are not.

    For example:

        treeify list 'mobilenet*' --max-macs 300M

        treeify list --family swin_transformer --json
    """
    criteria = _Filter(pattern, of_family, max_params, max_macs)
    rows = (results.shipped() if file is None else results.read(file)).newest()
    installed = library_names()
    # Whether a user's own function is still there, only calling it would tell.
    candidates = dict.fromkeys([*installed, *sorted(name for name in rows if ":" in name)])
    named = {name: rows.get(name) for name in candidates if criteria.names(rows.get(name), name)}
    missing = [name for name in rows if name not in candidates and criteria.names(rows[name], name)]
    failed = [name for name, row in named.items() if row is not None and not row.converted]
    unknown = [name for name, row in named.items() if row is None]
    shown = {
        name: row
        for name, row in named.items()
        if (not criteria.limited if row is None else row.converted and criteria.fits(row))
    }
    if as_json:
        models = [_as_json(name, row) for name, row in shown.items()]
        lists = {"not_checked": unknown, "failed": failed, "not_installed": missing}
        print_json({"models": models, **lists})
        return
    lines = (*_summary(shown, unknown, failed, criteria), *_of_other_versions(shown, missing))
    say(Console(), *([_table(shown)] if shown else []), *lines)


def _table(models: Mapping[str, Row | None]) -> Table:
    numbers = (Column(heading, "") for heading in ("parameters", "MACs", "packed"))
    columns = [Column("model", no_wrap=True), Column("family"), *numbers, Column("checked")]
    caption = "MACs per image of the usual size"
    rows = [_cells(name, row) for name, row in models.items()]
    return table(columns, rows, caption=f"{caption}; packed: fraction of the branches' MACs")


def _cells(name: str, row: Row | None) -> tuple[str, ...]:
    if row is None:
        return name, family(name), "?", "?", "?", "no"
    fraction = "?" if row.packed_fraction is None else f"{row.packed_fraction:.1%}"
    return name, row.family or "", _short(row.parameters), _short(row.macs), fraction, _checked(row)


def _short(number: int | None) -> str:
    return "?" if number is None else short(number)


def _checked(row: Row) -> str:
    if row.failure is not None:
        return f"failed: {row.failure:.60}"
    return str(row.how) if row.proven else f"{row.how}: shapes only"


def _summary(
    shown: dict[str, Row | None], unknown: list[str], failed: list[str], criteria: _Filter
) -> Iterator[str]:
    yield f"{len(shown)} models."
    if unknown and criteria.limited:
        yield f"{len(unknown)} more were never checked, so their size is unknown."
    elif unknown:
        yield f"{len(unknown)} of them were never checked: treeify verify NAME does it."
    if failed:
        yield f"{len(failed)} did not convert: {', '.join(failed)}"


def _of_other_versions(shown: dict[str, Row | None], missing: list[str]) -> Iterator[str]:
    present = results.versions()
    others = [row for row in shown.values() if row is not None and row.versions != present]
    if others:
        versions = {f"{key} {number}" for row in others for key, number in row.versions.items()}
        text = ", ".join(sorted(versions))
        yield f"{len(others)} of them were checked under other versions: {text}."
    if missing:
        yield f"{len(missing)} more that were checked are not in the installed libraries."


def _as_json(name: str, row: Row | None) -> dict[str, object]:
    return {
        "name": name,
        "family": family(name) if row is None else row.family,
        "parameters": row and row.parameters,
        "macs": row and row.macs,
        "packed_share": row and row.packed_fraction,
        "how": row and row.how,
        "proven": bool(row and row.proven),
        "failure": row and row.failure,
    }
