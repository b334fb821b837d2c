"""`treeify export`: a saved ensemble in, files out that answer without PyTorch."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from treeify.cli import quantities
from treeify.cli.options import (
    Json,
    NoVerify,
    Overwrite,
    SavedEnsemble,
    Trust,
    size,
    whole_numbers,
)
from treeify.cli.output import Column, print_json, say, table
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.deploy.directory import check_writable, require_packages
from treeify.deploy.exported import looks_exported
from treeify.deploy.exporter import Progress
from treeify.deploy.exporter import export as write
from treeify.deploy.saved import (
    checkpoint_in,
    data_section,
    held_out_data,
    held_out_images,
    library_classes,
    preparation_in,
    recipe_of,
    training_images,
)
from treeify.errors import InputError

DYNAMIC: Literal["dynamic"] = "dynamic"

# Images that ranges of values are taken from, and the most that answers are compared on: all of
# them are in memory.
_CALIBRATED_ON, _MOST_COMPARED, _MOST_VALUES = 256, 1000, 2**26


def export(
    directory: SavedEnsemble,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write, new or empty; by default exported/NAME."),
    ] = None,
    sizes: Annotated[
        Sequence[int] | None,
        whole_numbers(
            "--sizes", "Numbers of leaves at which a step ends, by default all nested sizes."
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Images that are answered together: dynamic is any number, 1 just one.",
        ),
    ] = DYNAMIC,
    input_size: Annotated[
        quantities.Size | None,
        size("--input-size", "Height and width, 96 or 96x160, if not the ensemble's."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Weights and activations of 8 bits, for the ranges that training images have:"
            " smaller, and faster where the processor has VNNI.",
        ),
    ] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="With --int8, key of a recipe's data section to set; may be repeated. A run"
            " directory knows its data.",
        ),
    ] = None,
    no_tune: Annotated[
        bool,
        typer.Option("--no-tune", help="Do not measure which form of each level is fastest."),
    ] = False,
    no_verify: NoVerify = False,
    overwrite: Overwrite = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write an ensemble as files that answer without PyTorch, the first answer first.

    One ONNX file for each step from size to size, which share no weights; `ensemble.json`, which
    says what is in them; `anytime.py`, which runs them and needs numpy and onnxruntime; and a
    README for Python, C++ and JavaScript. Every answer is compared with PyTorch's.

    For example:

        treeify export runs/digits_hne

        treeify export runs/digits_hne/best --out phone --sizes 1,4,16 --batch 1

        treeify export my_ensemble --int8 --calibrate name=image_folder --calibrate root=photos

        treeify predict exported/digits_hne digit.png
    """
    require_packages()
    count = _images(batch)
    _check(directory, calibrate, int8)
    path = checkpoint_in(directory, trust=trust)
    name = _name(path, directory, trust=trust)
    out = out or Path("exported") / name
    check_writable(out, overwrite=overwrite)
    console = Console(quiet=as_json)
    with console.status("loading"):
        hne = checkpoint.load(path, trust=trust).eval()
        if hne.preparation is None and len(hne.example) == 3:  # an earlier version saved it
            hne.preparation = preparation_in(path, trust=trust)
        _name_classes(hne, path, trust=trust)
    quantising: dict[str, Any] = {}
    if int8:
        with console.status("reading images to calibrate on"):
            quantising = _images_for_int8(path, hne, input_size, calibrate or (), trust=trust)
    with _shown(quiet=as_json) as observe:
        exported = write(
            hne,
            out,
            sizes=sizes,
            batch=count,
            input_size=input_size,
            **quantising,
            tune=not no_tune,
            verify=not no_verify,
            overwrite=overwrite,
            name=name,
            observe=observe,
        )
    manifest, quantisation = exported.manifest, exported.quantisation
    if as_json:
        print_json(manifest if quantisation is None else {**manifest, "report": quantisation})
    compared = "" if quantisation is None else str(quantisation)
    say(console, _steps_table(manifest), *_parities(manifest), *compared.splitlines())
    say(console, *_summary(manifest, out))


def _check(directory: Path, calibrate: Sequence[str] | None, int8: bool) -> None:
    if calibrate and not int8:
        raise InputError("--calibrate was given without --int8.", expected="both, or neither")
    if looks_exported(directory):
        raise InputError(
            f"{directory} is an export already.",
            expected="a run, one of its checkpoints, or a converted ensemble",
            next_step="Export what it was made from again, or copy its files.",
        )


def _name_classes(hne: HierarchicalEnsemble, path: Path, *, trust: bool) -> None:
    """Let a library's model name ImageNet's classes, as `treeify predict` does."""
    if hne.preparation is None or hne.preparation.classes is not None:
        return
    with torch.inference_mode():
        logits = hne.predict(hne.example_images(1), leaves=1)
    if isinstance(logits, torch.Tensor) and logits.ndim == 2:
        classes = library_classes(hne, path, logits.shape[-1], trust=trust)
        hne.preparation = replace(hne.preparation, classes=classes)


def _images_for_int8(
    path: Path,
    hne: HierarchicalEnsemble,
    input_size: quantities.Size | None,
    options: Sequence[str],
    *,
    trust: bool,
) -> dict[str, Any]:
    """Training images to calibrate on and held-out ones to compare with, as the library takes them.

    Raises:
        RecipeError: there is no run, and no data are named.
    """
    named = {option.partition("=")[0].strip() for option in options}
    if input_size is not None and "size" not in named:
        height, width = input_size
        options = [*options, f"size={height if height == width else [height, width]}"]
    section = data_section(path, options, option="--calibrate", trust=trust)
    data = held_out_data(path, section, options, hne.example[0], trust=trust)
    most = max(1, min(_MOST_COMPARED, _MOST_VALUES // data.example().numel()))
    return {
        "int8": training_images(data, _CALIBRATED_ON),
        "int8_held_out": held_out_images(data, most),
    }


def _images(batch: str) -> int | Literal["dynamic"]:
    """How many are answered together."""
    if batch == DYNAMIC:
        return DYNAMIC
    if re.fullmatch(r"[1-9]\d{0,8}", batch):
        return int(batch)
    raise InputError(
        f"--batch {batch!r} is no number of images.",
        expected="dynamic, for any number, or a number above 0, such as 1",
    )


def _name(path: Path, directory: Path, *, trust: bool) -> str:
    """What the export is called: as the run, or as the directory."""
    recipe = recipe_of(path, trust=trust)
    source = directory if recipe is None else recipe.parent
    return re.sub(r"[^\w.-]+", "_", source.resolve().name) or "ensemble"


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows how far an export is, on a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    hidden = quiet or not console.is_terminal
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("exporting", total=1.0)

        def observe(event: Progress) -> None:
            where = f"step {event.step} of {event.steps}: " if event.step else ""
            bar.update(task, completed=event.done, description=f"{where}{event.what}")

        yield observe


def _steps_table(manifest: Mapping[str, Any]) -> Table:
    columns = [
        Column("file", no_wrap=True),
        Column("leaves", "d"),
        Column("MB", ",.2f"),
        Column("MACs", ",d"),
        Column("parameters", ",d"),
        Column("forms"),
    ]
    rows = [
        (
            step["file"],
            step["leaves"],
            step["bytes"] / 1e6,
            step["macs"],
            step["parameters"],
            _forms(step["forms"]),
        )
        for step in manifest["steps"]
    ]
    caption = "MACs per image and parameters of a step alone; forms: how many levels run so"
    return table(columns, rows, caption=caption)


def _forms(forms: Mapping[str, str]) -> str:
    """How many levels have which form; they are listed in `ensemble.json`."""
    counts = Counter(forms.values())
    return ", ".join(f"{count} {form}" for form, count in counts.items())


def _parities(manifest: Mapping[str, Any]) -> Iterator[str]:
    """How far the files' answers are from PyTorch's."""
    steps = manifest["steps"]
    for number, step in enumerate(steps, 1):
        if (parity := step["parity"]) is not None:
            difference = parity["largest_difference"]
            yield (
                f"step {number} of {len(steps)}: largest difference {difference:.1e} of the largest"
                " logit"
            )
    if any(step["parity"] is None for step in steps):
        yield "Not compared with PyTorch's answers, as --no-verify says."


def _summary(manifest: Mapping[str, Any], out: Path) -> Iterator[str]:
    """What was written, and how it is used."""
    steps = manifest["steps"]
    total = sum(step["bytes"] for step in steps) / 1e6
    first = manifest["images"]["shape"][0]
    images = "any number of images" if first == "batch" else f"{first} at a time"
    megabytes = f"{total:,.2f} MB, the first {steps[0]['bytes'] / 1e6:,.2f} MB"
    yield f"Written to {out}: {len(steps)} steps, {megabytes}; for {images}."
    yield f"Classify with it: treeify predict {out} image.jpg"
    yield (
        f"Elsewhere, after pip install numpy onnxruntime pillow, beside {out / 'anytime.py'} (C++"
        f" and JavaScript: {out / 'README.md'}):"
    )
    yield "  from anytime import Anytime"
    yield f"  model = Anytime({str(out)!r})"
    yield '  for step in model.anytime(model.open("image.jpg")): print(step.leaves, step.logits)'
