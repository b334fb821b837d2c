"""A directory -> what is known of it: runs, ensembles by themselves, and exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.saved_config import read_config
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.exported_scores import exported_seconds
from treeify.deploy.saved import (
    base_model_in,
    checkpoint_in,
    data_for_export,
    data_section,
    exported_in,
    held_out_data,
    recipe_of,
    skips_damaged,
)
from treeify.engine import timing
from treeify.errors import CheckpointError, DataError, InputError, RecipeError, TreeifyError
from treeify.evaluation.cost import answer_seconds, base_cost, costs
from treeify.evaluation.metrics import placed
from treeify.parity.verify import verify
from treeify.report import exported_facts, training_facts, tree_facts
from treeify.report.answers import answers_of, answers_of_export
from treeify.report.results import Conversion, Result, Times
from treeify.training.distributed import resolve_device
from treeify.training.loaders import held_out_loader, noting
from treeify.training.model import check_classes
from treeify.training.recipe import DataRecipe

# As of `treeify eval`, so that numbers are the same to the last digit.
_BATCH = 128
_NOT_TIMED = "Answers were not timed, as --no-latency says."


@dataclass(frozen=True)
class Options:
    """What is measured, and on what.

    Args:
        data: keys of the recipe's data section to set, as `key=value`.
        latency: whether to time answers.
        check: whether to compare ensembles with their untouched architecture.
        trust: whether what directories name may be imported.
        device: that ensembles are measured on.
        weights: trained weights of the base model, to measure it too.
    """

    data: Sequence[str] = ()
    latency: bool = True
    check: bool = True
    trust: bool = False
    device: str = "auto"
    weights: Path | None = None


def read(directory: Path, name: str, options: Options) -> Result:
    """What a run, an ensemble or an export holds, and what it answers to its held-out images.

    Args:
        directory: of it, or a checkpoint of a run.
        name: of it on the page.
        options: what is measured.

    Raises:
        CheckpointError: it is none of these, or damaged.
        DataError, RecipeError: the data that were asked for cannot be read.
    """
    exported = exported_in(directory, options.device)
    if exported is not None:
        return _of_export(exported, name, options)
    return _of_checkpoint(directory, name, options)


def _of_checkpoint(directory: Path, name: str, options: Options) -> Result:
    path = checkpoint_in(directory, trust=options.trust)
    hne = checkpoint.load(path, trust=options.trust).to(resolve_device(options.device)).eval()
    recipe = recipe_of(path, trust=options.trust)
    conversion = hne.conversion
    result = Result(
        name,
        directory,
        "run" if recipe else "ensemble",
        sizes=costs(hne),
        base=base_cost(hne),
        levels=tree_facts.levels_of(hne),
        latencies=tree_facts.latencies_of(hne),
        budgets=tuple(hne.budgets.values()),
        conversion=Conversion(conversion.packed_fraction, conversion.fallbacks, conversion.notes),
        origin={"checkpoint": str(path), **tree_facts.origin_of(read_config(path, trust=True))},
    )
    if recipe is None:
        result = _lacking(result, "training", "It is an ensemble by itself: no run wrote it.")
    else:
        result = training_facts.with_training(result, recipe, trust=options.trust)
    return _measured(result, hne, path, options)


def _measured(result: Result, hne: HierarchicalEnsemble, path: Path, options: Options) -> Result:
    """The same with what is measured here: answers, times and parity."""
    base, weights, notes = base_model_in(hne, options.weights, path, trust=options.trust)
    if weights is None:
        notes = notes or ["The base model's accuracy is not known: --weights PATH measures it."]
        result = _lacking(result, "base", " ".join(notes))
    result, x = _answered(result, hne, path, options, None if weights is None else base)
    return _verified(_timed(result, hne, x, base, options), hne, options)


def _answered(
    result: Result,
    hne: HierarchicalEnsemble,
    path: Path,
    options: Options,
    base: nn.Module | None,
) -> tuple[Result, Tensor]:
    """The same with the answers to the held-out images, and one image of their size."""
    blank = placed(hne.example_images(1), hne)
    section = _section(path, options)
    if isinstance(section, str):
        return _lacking(result, "answers", section), blank
    try:
        data = held_out_data(path, section, options.data, hne.example[0], trust=options.trust)
        check_classes(hne, data)
        skipped: set[str] = set()
        skip = skips_damaged(path, trust=options.trust)
        batches = noting(held_out_loader(data.held_out, _BATCH, skip=skip), skipped)
        answers = replace(answers_of(hne, batches, data, base), skipped=tuple(sorted(skipped)))
        x = placed(data.example()[None], hne)
    except (DataError, OSError) as error:
        if options.data:
            raise
        return _lacking(result, "answers", _first_line(error)), blank
    sizes = result.sizes if tuple(x.shape[1:]) == hne.example else costs(hne, x)
    return replace(result, answers=answers, data_set=section.name, sizes=sizes), x


def _timed(
    result: Result, hne: HierarchicalEnsemble, x: Tensor, base: nn.Module, options: Options
) -> Result:
    """The same with the time of an answer for one image."""
    if not options.latency:
        return _lacking(result, "times", _NOT_TIMED)
    try:
        seconds = answer_seconds(hne, x, base=base)
    except InputError as error:  # it takes several images at once only
        return _lacking(result, "times", _first_line(error))
    return replace(result, times=Times(seconds, timing.describe(x.device)))


def _verified(result: Result, hne: HierarchicalEnsemble, options: Options) -> Result:
    """The same with how far the ensemble is from its untouched architecture."""
    if not options.check:
        return _lacking(result, "parity", "It was not checked, as --no-verify says.")
    try:
        figures = asdict(verify(hne, hne.example_images(2)))
    except TreeifyError as error:
        return _lacking(result, "parity", _first_line(error))
    deviations = {key: value for key, value in figures.items() if isinstance(value, float)}
    return replace(result, parity=deviations)


def _of_export(exported: ExportedEnsemble, name: str, options: Options) -> Result:
    result = replace(exported_facts.result_of(exported, name), path=exported.path)
    x = exported.example_images(1)[:1]  # one also where it answers a fixed number
    if not options.data:
        result = _lacking(
            result,
            "answers",
            "An export does not say what it was measured on: name data with --data.",
        )
    else:
        section = data_section(exported.path, options.data, trust=options.trust)
        data = data_for_export(exported, section, options.data)
        batches = held_out_loader(data.held_out, _BATCH)
        with timing.threads(1):  # see `exported_scores`
            answers = answers_of_export(exported, batches, data)
        x = data.example()[None]
        result = replace(result, answers=answers, data_set=section.name)
    if options.latency:
        with timing.threads(1):
            times = Times(exported_seconds(exported, x), exported.model.setting)
        return replace(result, times=times)
    return _lacking(result, "times", _NOT_TIMED)


def _section(path: Path, options: Options) -> DataRecipe | str:
    """The data to measure on, or why they are not known."""
    try:
        return data_section(path, options.data, trust=options.trust)
    except (RecipeError, CheckpointError) as error:
        if options.data:
            raise
        if isinstance(error, RecipeError):
            return "What to measure it on is not known: name data with --data."
        return _first_line(error)


def _lacking(result: Result, what: str, why: str) -> Result:
    return replace(result, missing={**result.missing, what: why})


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0]
    return text[0].upper() + text[1:]
