"""What `treeify ablate` left behind: the last scores of every run, and what is left of the runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from treeify import files
from treeify.conversion import checkpoint
from treeify.deploy.saved import checkpoint_in
from treeify.errors import CheckpointError, TreeifyError
from treeify.evaluation.cost import Cost, base_cost, costs
from treeify.evaluation.metrics import Score
from treeify.report.results import GridResult, SeedRun, Variant
from treeify.training.recipe_file import values_of_run
from treeify.training.run_directory import ENVIRONMENT, METRICS, RECIPE, RunDirectory, is_run

RESULTS = "results.json"
# Grids may have thousands of runs, of a few kilobytes each.
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Row:
    """A finished run as `treeify ablate` writes it: what a report reads of it."""

    variant: str
    seed: int
    train: Annotated[tuple[Score, ...], Field(min_length=1)]
    held_out: Annotated[tuple[Score, ...], Field(min_length=1)]
    versions: dict[str, str | None] | None = None
    commit: str | None = None


_ROWS = TypeAdapter(Annotated[list[Row], Field(min_length=1)])


def read_rows(file: Path) -> list[Row]:
    """The runs in a file of results.

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    try:
        return _ROWS.validate_json(files.read_bytes(file, _MOST_BYTES))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "the file"
        raise CheckpointError(
            f"{file} holds no results, or those of another version.",
            expected="a list of runs with variant, seed, train and held_out, as treeify ablate"
            " writes it",
            found=f"{place}: {detail['msg']}",
            next_step="Write it again: treeify ablate GRID trains nothing that has finished.",
        ) from error


def runs_below(directory: Path) -> dict[tuple[str, int], Path]:
    """The runs of a grid by variant and seed, where `treeify ablate` puts them."""
    found = {}
    for path in sorted(directory.glob("*/seed*")):
        number = path.name.removeprefix("seed")
        if number.isdecimal() and is_run(path):
            found[path.parent.name, int(number)] = path
    return found


def is_grid(path: Path) -> bool:
    """Whether a path is a grid's directory, or the file of its results."""
    if path.is_dir():
        return (path / RESULTS).is_file() or (not is_run(path) and bool(runs_below(path)))
    return path.is_file() and path.suffix == ".json"


def read_grid(path: Path, name: str, *, trust: bool = False) -> GridResult:
    """What is known of a grid: of the runs in its file of results, which have finished.

    Without the file, the last epoch of every run that is there counts, finished or not.

    Args:
        path: the directory, or its file of results.
        name: of it on the page.
        trust: whether what its runs name may be imported.

    Raises:
        CheckpointError: it cannot be read, no run has written metrics, or a link leads out of it.
    """
    directory = path if path.is_dir() else path.parent
    runs = runs_below(directory)
    file = directory / RESULTS if path.is_dir() else path
    if not trust:
        _require_inside(directory, [file] if path.is_dir() else [], runs.values())
    rows = read_rows(file) if file.is_file() else _last_epochs(runs)
    if not rows:
        raise CheckpointError(
            f"no run in {path} has written metrics yet.",
            expected="at least one epoch of one run",
            next_step="Train first: treeify ablate GRID.",
        )
    by_variant: dict[str, list[SeedRun]] = defaultdict(list)
    for row in rows:
        run = runs.get((row.variant, row.seed))
        epochs = () if run is None else tuple(RunDirectory(run).metrics())
        by_variant[row.variant].append(SeedRun(row.seed, row.held_out, row.train, epochs))
    missing: dict[str, str] = {}
    if not file.is_file():
        missing["results"] = f"There is no {RESULTS}: runs are shown as far as they have got."
    variants, bases = [], set()
    for variant, seeds in by_variant.items():
        sizes, base = _costs(runs, variant, missing, trust=trust) or ((), None)
        variants.append(Variant(variant, tuple(seeds), sizes))
        bases.add(base)
    bases.discard(None)
    if len(bases) > 1:
        missing["base"] = "Its variants have different base models, which are left out."
    base = bases.pop() if len(bases) == 1 else None
    return GridResult(
        name, path, tuple(variants), _data_set(runs), base, _origin(path, rows, runs), missing
    )


def _require_inside(directory: Path, others: Iterable[Path], runs: Iterable[Path]) -> None:
    """Refuse links of what is read of a grid and of its runs that lead out of it.

    Raises:
        CheckpointError: one does.
    """
    for run in runs:
        for path in (run, *(run / name for name in (METRICS, RECIPE, ENVIRONMENT))):
            files.require_inside(path, directory)
    for path in others:
        files.require_inside(path, directory)


def _costs(
    runs: Mapping[tuple[str, int], Path], variant: str, missing: dict[str, str], *, trust: bool
) -> tuple[tuple[Cost, ...], Cost] | None:
    """What the nested sizes of a variant and its base model cost; else it is said why not."""
    run = next((path for (name, _), path in runs.items() if name == variant), None)
    if run is None:
        why = "the grid's runs are not there." if not runs else "no run of it is there."
        missing[f"sizes of {variant}"] = f"What {variant} costs is not known: {why}"
        return None
    try:
        hne = checkpoint.load(checkpoint_in(run, trust=trust), trust=trust)
    except (TreeifyError, OSError) as error:
        why = str(error).splitlines()[0]
        missing[f"sizes of {variant}"] = f"What {variant} costs is not known: {why}"
        return None
    return costs(hne), base_cost(hne)


def _origin(
    path: Path, rows: Sequence[Row], runs: Mapping[tuple[str, int], Path]
) -> dict[str, str]:
    seeds = sorted({row.seed for row in rows})
    variants = list(dict.fromkeys(row.variant for row in rows))
    facts = {
        "grid": str(path),
        "runs": f"{len(rows)}, of {len(variants)} variants: {', '.join(variants)}",
        "seeds": ", ".join(map(str, seeds)),
    }
    versions = {f"{name} {number}" for row in rows for name, number in (row.versions or {}).items()}
    if versions:
        facts["versions"] = ", ".join(sorted(versions))
    if commits := sorted({row.commit for row in rows if row.commit}):
        facts["commit"] = ", ".join(commits)
    for run in list(runs.values())[:1]:
        with suppress(TreeifyError):
            facts["machine"] = RunDirectory(run).environment().platform
    return facts


def _last_epochs(runs: Mapping[tuple[str, int], Path]) -> list[Row]:
    rows = []
    for (variant, seed), path in runs.items():
        if epochs := RunDirectory(path).metrics():
            rows.append(Row(variant, seed, epochs[-1].train, epochs[-1].held_out))
    return rows


def _data_set(runs: Mapping[tuple[str, int], Path]) -> str | None:
    """The name of the data set, if the runs have one and the same."""
    names = set()
    for path in runs.values():
        with suppress(TreeifyError):
            section = values_of_run(path / RECIPE).get("data")
            names.add(section.get("name") if isinstance(section, dict) else None)
    (name,) = names if len(names) == 1 else (None,)
    return name if isinstance(name, str) else None
