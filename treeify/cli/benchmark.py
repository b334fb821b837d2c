"""`treeify benchmark`: how fast ensembles and exports answer here, in every engine there is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from treeify.cli.options import Json, Trust
from treeify.cli.output import Column, print_json, say, table
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.exported_scores import exported_scores
from treeify.deploy.saved import (
    checkpoint_in,
    data_for_export,
    data_section,
    exported_in,
    held_out_data,
    skips_damaged,
)
from treeify.deploy.speed import (
    BASE,
    CALL,
    FIRST,
    STEPS,
    Actions,
    Times,
    ensemble_actions,
    export_actions,
    installed_engines,
    take_turns,
)
from treeify.engine import timing
from treeify.evaluation.comparison import base_model_of
from treeify.evaluation.metrics import Scores, measure
from treeify.models.hub import local_path
from treeify.training.loaders import held_out_loader
from treeify.training.model import check_classes

PYTORCH = "PyTorch"
_CPU = torch.device("cpu")
_IMAGES_AT_ONCE = 128
_SECONDS = 10.0  # of measuring, for each subject in an engine


def benchmark(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            parser=local_path,
            help="Exports, saved ensembles, or run directories (the last checkpoint is taken), also"
            " as hf-hub:org/name@revision.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of a recipe's data section to set, to measure accuracy too, as treeify eval"
            " does; may be repeated.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that compute a call, by default as many as cores."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds to measure, at most.")] = 50,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure how fast ensembles and exports answer here, side by side.

    The first answer, all steps one after the other, and one call for the answer of all leaves, on
    the CPU. Saved ensembles answer in PyTorch, and their base model beside them; exports in each
    engine that is installed, ONNX Runtime or OpenVINO. What one engine runs takes turns; engines
    are measured one after the other, since two pools of threads slow each other.

    For example:

        treeify benchmark runs/digits_hne exported/digits_hne

        treeify benchmark exported/digits_hne --batch 8 --threads 1 --json

        treeify benchmark exported/digits_hne --data name=digits
    """
    count = threads or torch.get_num_threads()
    console = Console(quiet=as_json)
    with console.status("loading"):
        subjects = [
            subject
            for directory in directories
            for subject in _subjects(directory, batch, count, data or (), trust=trust)
        ]
    times = _measured(subjects, repeats, count, console)
    accuracies: dict[Path, dict[int, float] | None] = {}
    if data:
        with console.status("answering the held-out images"):
            accuracies = {each.directory: each.accuracy() for each in _apart(subjects)}
    rows = [
        _row(subject, found, accuracies.get(subject.directory))
        for subject, found in zip(subjects, times, strict=True)
    ]
    if as_json:
        settings = {"processor": timing.processor(), "threads": count, "batch": batch}
        print_json({**settings, "rows": rows})
    say(console, _table(rows), *_notes(subjects, count, batch))


@dataclass(frozen=True)
class _Subject:
    """A directory in an engine.

    Args:
        directory: what the user named.
        engine: that answers.
        images: per call.
        sizes: numbers of leaves at which answers come.
        bytes: of its weights, or files.
        prepare: opens it, and gives what is measured.
        accuracy: measures that of every size on held-out images, by number of leaves.
    """

    directory: Path
    engine: str
    images: int
    sizes: Sequence[int]
    bytes: int
    prepare: Callable[[], Actions]
    accuracy: Callable[[], dict[int, float]]


def _subjects(
    directory: Path, batch: int, threads: int, data: Sequence[str], *, trust: bool
) -> Iterable[_Subject]:
    """A directory in every engine it runs in."""
    exported = exported_in(directory)
    if exported is None:
        path = checkpoint_in(directory, trust=trust)
        hne = checkpoint.load(path, trust=trust).eval()
        yield _of_ensemble(directory, path, hne, batch, data, trust=trust)
        return
    for engine in installed_engines():
        yield _of_export(exported, engine, batch, threads, data)


def _of_ensemble(
    directory: Path,
    path: Path,
    hne: HierarchicalEnsemble,
    batch: int,
    data: Sequence[str],
    *,
    trust: bool,
) -> _Subject:
    def accuracy() -> dict[int, float]:
        section = data_section(path, data, trust=trust)
        images = held_out_data(path, section, data, hne.example[0], trust=trust)
        check_classes(hne, images)
        skip = skips_damaged(path, trust=trust)
        return _by_size(measure(hne, held_out_loader(images.held_out, _IMAGES_AT_ONCE, skip=skip)))

    x = hne.example_images(batch)
    tensors = hne.state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return _Subject(
        directory,
        PYTORCH,
        len(x),
        hne.tree.nested_sizes,
        size,
        lambda: ensemble_actions(hne, x, base_model_of(hne, None)),
        accuracy,
    )


def _of_export(
    exported: ExportedEnsemble, engine: str, batch: int, threads: int, data: Sequence[str]
) -> _Subject:
    def accuracy() -> dict[int, float]:
        images = data_for_export(exported, data_section(exported.path, data), data)
        batches = held_out_loader(images.held_out, _IMAGES_AT_ONCE)
        with timing.threads(1):
            scores, _ = exported_scores(exported, batches, images.classes)
        return {leaves: _by_size(scores)[leaves] for leaves in exported.sizes}

    x = exported.example_images(batch)
    steps = exported.model.manifest["steps"]
    return _Subject(
        exported.path,
        engine,
        len(x),
        exported.sizes,
        sum(step["bytes"] + step.get("data", {}).get("bytes", 0) for step in steps),
        lambda: export_actions(exported, engine, threads, x),
        accuracy,
    )


def _by_size(scores: Scores) -> dict[int, float]:
    return {score.leaves: score.accuracy for score in scores.result()}


def _apart(subjects: Sequence[_Subject]) -> Iterable[_Subject]:
    """One subject of each directory: engines give the same answers."""
    return {subject.directory: subject for subject in subjects}.values()


def _measured(
    subjects: Sequence[_Subject], repeats: int, threads: int, console: Console
) -> list[dict[str, Times]]:
    """The times of all subjects, in their order; PyTorch comes last."""
    found: dict[int, dict[str, Times]] = {}
    engines = sorted({subject.engine for subject in subjects}, key=lambda name: name == PYTORCH)
    for engine in engines:
        chosen = [index for index, subject in enumerate(subjects) if subject.engine == engine]
        own = threads if engine == PYTORCH else 1
        with console.status(f"measuring in {engine}"), timing.threads(own):
            actions = [subjects[index].prepare() for index in chosen]
            budget = _SECONDS * len(chosen)
            results = take_turns(actions, _CPU, repeats=repeats, budget=budget)
        found |= zip(chosen, results, strict=True)
    return [found[index] for index in range(len(subjects))]


def _row(
    subject: _Subject, times: Mapping[str, Times], accuracy: Mapping[int, float] | None
) -> dict[str, Any]:
    # An export has no base model: its first step computes as much.
    base = times.get(BASE, times[FIRST])
    return {
        "directory": subject.directory,
        "engine": subject.engine,
        "batch": subject.images,
        "sizes": subject.sizes,
        "bytes": subject.bytes,
        **{name: times.get(name) for name in (BASE, FIRST, STEPS, CALL)},
        "call_per_base": times[CALL].median / base.median,
        "accuracy": accuracy,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        Column("directory"),
        Column("engine", no_wrap=True),
        Column("MB", ",.2f"),
        Column("base ms", "s"),
        Column("first ms", "s"),
        Column("steps ms", "s"),
        Column("call ms", "s"),
        Column("call / base", ".2f"),
    ]
    has_accuracy = any(row["accuracy"] for row in rows)
    if has_accuracy:
        columns.append(Column("accuracy %", ".2f"))
    cells = []
    for row in rows:
        times = [
            "-" if row[name] is None else str(row[name]) for name in (BASE, FIRST, STEPS, CALL)
        ]
        line = [str(row["directory"]), row["engine"], row["bytes"] / 1e6, *times]
        line.append(row["call_per_base"])
        cells.append([*line, row["accuracy"][max(row["accuracy"])]] if has_accuracy else line)
    caption = (
        "medians, and half the distance between the quartiles; base: the base model alone, in the"
        " same engine. An export has none: call / base is by its first answer, which costs as much"
        if any(row[BASE] is None for row in rows)
        else "medians, and half the distance between the quartiles; base: the base model alone"
    )
    return table(columns, cells, caption=caption)


def _notes(subjects: Sequence[_Subject], threads: int, batch: int) -> Iterable[str]:
    yield (
        "first: the answer of the first size; steps: all of them in turn; call: the last one at"
        f" once. {timing.processor()}; threads: {threads}, images: {batch}."
    )
    for subject in _apart(subjects):
        if subject.images != batch:
            yield f"{subject.directory} takes {subject.images} images, and was given as many."
