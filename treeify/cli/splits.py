"""`treeify splits`: the points where a model can be split."""

from typing import Annotated

import typer
from rich.console import Console

from treeify.cli.options import InputSize, Json, Name, NumClasses, Trust, Weights
from treeify.cli.output import Column, print_json, say, table
from treeify.conversion.assemble import trace_model
from treeify.conversion.splits import SplitPoint, split_points
from treeify.conversion.trained import load_trained
from treeify.models.base_model import base_model


def splits(
    name: Name,
    clean: Annotated[
        bool, typer.Option("--clean", help="Only points where a single tensor is live.")
    ] = False,
    num_classes: NumClasses = None,
    input_size: InputSize = None,
    weights: Weights = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """List the points where a model can be split.

    A split at a point shares everything before it and repeats everything after it in each branch.
    Pass names, from input to output, to `treeify convert NAME --splits`. They do not depend on the
    weights: `--weights` tells whether those fit.

    For example:

        treeify splits resnet18

        treeify splits resnet18 --weights mine.pth --num-classes 10

        treeify splits torchvision/vit_b_16 --clean --input-size 64
    """
    base = base_model(name, num_classes, input_size)
    notes = list(base.notes)
    if weights is not None:
        architecture = base.architecture.name
        trained = load_trained(base.model, weights, num_classes, name=architecture, trust=trust)
        notes += trained.notes
    traced = trace_model(base.model, base.architecture, base.example)
    points = [point for point in split_points(traced) if point.live == 1 or not clean]
    shape = base.example.shape[1:]
    if as_json:
        print_json(
            {
                "model": str(base.architecture),
                "input": list(shape),
                "points": points,
                "notes": notes,
            }
        )
        return
    names = Column("split")
    headings = ("MACs before", "MACs after", "fraction after", "live")
    numbers = [Column(heading, ",d") for heading in headings]
    rows = [
        (point.name, point.macs_before, point.macs_after, _fraction_after(point), point.live)
        for point in points
    ]
    title = f"{base.architecture} at {' x '.join(map(str, shape))}"
    caption = "MACs per image; live: tensors that cross the split"
    say(Console(), table([names, *numbers], rows, title=title, caption=caption), *notes)


def _fraction_after(point: SplitPoint) -> str:
    total = point.macs_before + point.macs_after
    return f"{point.macs_after / total:.1%}" if total else "-"
