"""`treeify convert`: a base model's name in, a directory that `treeify.load` reads out."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from treeify.cli.options import (
    InputSize,
    Json,
    Name,
    NoVerify,
    NumClasses,
    Out,
    Overwrite,
    Trust,
    Weights,
    numbers,
)
from treeify.cli.output import Column, print_json, say, table
from treeify.conversion import saving
from treeify.conversion.api import hierarchicalize
from treeify.conversion.assemble import assemble
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import INITS, initial_weights
from treeify.data import Preparation
from treeify.errors import InputError
from treeify.evaluation.cost import Cost, base_cost, costs
from treeify.models.architecture import Architecture
from treeify.models.base_model import base_model
from treeify.parity.verify import verify


def convert(
    name: Name,
    splits: Annotated[
        str,
        typer.Option(
            help="How many, or names from input to output, each with a fanout if it differs: "
            "4, layer2,layer3 or layer3:16. 'input' splits before the first operation."
        ),
    ] = "4",
    fanout: Annotated[int, typer.Option(help="Children per split that names none.")] = 2,
    init: Annotated[
        str | None,
        typer.Option(
            help="fresh: every branch its own random weights; copy: every leaf equals the base "
            "model; perturb: copy plus noise, leaf 0 exact. By default fresh, with --weights or "
            "--pretrained perturb."
        ),
    ] = None,
    weights: Weights = None,
    trust: Trust = False,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the trained weights of its library.")
    ] = False,
    num_classes: NumClasses = None,
    input_size: InputSize = None,
    mean: Annotated[
        Sequence[float] | None,
        numbers("--mean", "Of the channels its images were trained with, pixels in 0 to 1."),
    ] = None,
    std: Annotated[
        Sequence[float] | None, numbers("--std", "Their deviation; with --mean.", positive=True)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Convert a classifier into a hierarchical neural ensemble.

    Shows where it splits, what every nested size costs and how each part runs, checks every leaf
    against the untouched base architecture, and writes a directory that `treeify.load` reads.

    For example:

        treeify convert mobilenetv2_140 --splits 4

        treeify convert resnet18 --weights mine.pth --num-classes 10

        treeify convert my_models:net --weights net.pth --input-size 28 --mean 0.5 --std 0.5

        treeify convert torchvision/resnet18 --splits layer3,layer4:4 --num-classes 10

        treeify convert my_package.models:tiny --splits input:4 --init copy --out four_copies
    """
    out = target(name, out, overwrite)
    _check_statistics(mean, std)
    scheme, reason = _init(init, weights, pretrained)
    console = Console(quiet=as_json)
    with console.status("building and converting"):
        base = base_model(name, num_classes, input_size, pretrained=pretrained, seed=seed)
        if pretrained:
            source = initial_weights(base.model, base.architecture, scheme, seed)
            hne = assemble(
                base.model,
                base.architecture,
                splits,
                source,
                fanout=fanout,
                example_input=base.example,
            )
        else:
            hne = hierarchicalize(
                base.architecture,
                splits,
                fanout,
                scheme,
                seed,
                base.example,
                weights,
                trust=trust,
            )
    if mean is not None:
        hne.preparation = _with_statistics(hne, mean, std)
    say(console, *base.notes)
    if weights is None:  # else the conversion's notes say it
        say(console, f"Init {scheme}, {reason}: {INITS[scheme]}.")
    present(hne, base.architecture, console, out, overwrite, no_verify, as_json)


def target(name: str, out: Path | None, overwrite: bool) -> Path:
    """The directory to write, which is refused before anything is built if it is taken."""
    out = out or Path("converted") / re.sub(r"[^\w.-]+", "_", name)
    saving.check_writable(out, overwrite=overwrite)
    return out


def present(
    hne: HierarchicalEnsemble,
    architecture: Architecture,
    console: Console,
    out: Path,
    overwrite: bool,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Show what an ensemble costs and how it runs, check it, and write it."""
    with console.status("counting MACs"):
        cost, nested = base_cost(hne), costs(hne)
    shape = " x ".join(map(str, hne.example))
    say(console, f"{architecture} at {shape}", _splits_table(hne), str(hne.tree))
    say(console, _cost_table(cost, nested), str(hne.conversion))
    figures = None
    if not no_verify:
        with console.status("checking every leaf against the base architecture"):
            figures = verify(hne, hne.example_images(2))
        say(
            console,
            f"Parity with the base architecture holds: the largest deviation is {figures.worst:.2g}"
            " of the tolerance (leaves in evaluation and training mode, buffers, nested sizes,"
            " gradients).",
        )
    if hne.preparation is not None:
        say(console, f"Images: {hne.preparation}.")
    saving.save(hne, out, overwrite=overwrite)
    say(console, f"Written to {out}; read it with treeify.load({str(out)!r}).")
    if as_json:
        print_json(_report(architecture, hne, cost, nested) | {"parity": figures, "out": out})


def _check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise InputError("--mean or --std was given alone.", expected="both, or neither")


def _with_statistics(
    hne: HierarchicalEnsemble, mean: Sequence[float], std: Sequence[float] | None
) -> Preparation:
    """How images are prepared for an ensemble, by these numbers."""
    if len(hne.example) != 3:
        raise InputError(
            f"the model takes inputs of shape {hne.example}, not images.",
            next_step="Leave --mean and --std out.",
        )
    channels, height, width = hne.example
    preparation = hne.preparation or Preparation(size=(height, width), channels=channels)
    return preparation.with_statistics(mean, std, "--mean and --std of treeify convert")


def _init(init: str | None, weights: Path | None, pretrained: bool) -> tuple[str, str]:
    """The scheme, and why it is this one."""
    if weights is not None and pretrained:
        raise InputError(
            "--weights and --pretrained were given.", expected="one of them, or neither"
        )
    option = "--pretrained" if pretrained else "--weights"
    is_trained = pretrained or weights is not None
    if is_trained and init == "fresh":
        raise InputError(
            f"--init fresh would throw the weights of {option} away.",
            expected=f"--init copy or --init perturb with {option}",
        )
    if init is not None:
        return init, "as --init says"
    if is_trained:
        return "perturb", f"the default with {option}"
    return "fresh", "the default without --weights or --pretrained"


def _splits_table(hne: HierarchicalEnsemble) -> Table:
    headings = ("fanout", "MACs before", "MACs after", "live")
    columns = [Column("split", no_wrap=True), *(Column(heading, ",d") for heading in headings)]
    rows = [
        (point.name, fanout, point.macs_before, point.macs_after, point.live)
        for point, fanout in zip(hne.conversion.splits.points, hne.tree.fanouts, strict=True)
    ]
    caption = "MACs per image of one path; live: tensors that cross the split"
    return table(columns, rows, caption=caption)


def _cost_table(base: Cost, nested: tuple[Cost, ...]) -> Table:
    """Each nested size beside the base model and beside as many independent networks."""
    headings = ("leaves", "MACs", "x base", "independent", "parameters", "x base")
    rows = [
        (
            "base model" if cost is base else cost.leaves,
            cost.macs,
            _ratio(cost.macs, base.macs),
            cost.leaves * base.macs,
            cost.parameters,
            _ratio(cost.parameters, base.parameters),
        )
        for cost in (base, *nested)
    ]
    caption = "MACs per image, as fvcore counts; independent: as many base models"
    return table([Column(heading, ",d") for heading in headings], rows, caption=caption)


def _ratio(number: int, base: int) -> str:
    return f"{number / base:.2f}" if base else "-"


def _report(
    architecture: Architecture, hne: HierarchicalEnsemble, cost: Cost, nested: tuple[Cost, ...]
) -> dict[str, Any]:
    """What the tables show, and how every node runs; `cost` is that of the base model."""
    conversion = hne.conversion
    points = zip(conversion.splits.points, hne.tree.fanouts, strict=True)
    return {
        "model": asdict(architecture),
        "input": hne.example,
        "splits": [asdict(point) | {"fanout": fanout} for point, fanout in points],
        "leaves": hne.leaves,
        "branches": hne.tree.branches,
        "base": {"macs": cost.macs, "parameters": cost.parameters},
        "nested": [
            asdict(size)
            | {
                "independent_macs": size.leaves * cost.macs,
                "independent_parameters": size.leaves * cost.parameters,
            }
            for size in nested
        ],
        "packed_share": conversion.packed_fraction,
        "nodes": [
            {
                "path": node.path,
                "operation": node.operation,
                "level": node.level,
                "runs": node.form,
                "reason": node.reason,
                "macs": node.macs,
            }
            for node in conversion.nodes
        ],
        "notes": conversion.notes,
    }
