"""`treeify splits`: the points where a model can be split."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from treeify.cli.options import InputSize, Json, Name, NumClasses
from treeify.conversion.api import open_up
from treeify.conversion.splits import split_points
from treeify.models.base_model import base_model


def splits(
    name: Name,
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Only points where a single tensor is live."),
    ] = False,
    num_classes: NumClasses = None,
    input_size: InputSize = None,
    as_json: Json = False,
) -> None:
    """List the points where a model can be split.

    A split at a point shares everything before it and repeats everything after it in each branch.
    Pass names, from input to output, to `treeify convert NAME --splits`.

    For example:

        treeify splits resnet18

        treeify splits torchvision/vit_b_16 --clean --input-size 64
    """
    base = base_model(name, num_classes, input_size)
    traced = trace_model(base.model, base.architecture, base.example)
    points = [point for point in split_points(traced) if point.live == 1 or not clean]
    if as_json:
        shape = list(base.example.shape[1:])
        rows = [asdict(point) for point in points]
        typer.echo(json.dumps({"model": str(base.architecture), "input": shape, "points": rows}))
        return
    table = Table(
        title=f"{base.architecture} at {' x '.join(map(str, base.example.shape[1:]))}",
        caption="MACs per image; live: tensors that cross the split",
    )
    table.add_column("split", overflow="fold")
    for heading in ("MACs before", "MACs after", "share after", "live"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        total = point.macs_before + point.macs_after
        share = f"{point.macs_after / total:.1%}" if total else "-"
        row = (f"{point.macs_before:,}", f"{point.macs_after:,}", share, str(point.live))
        table.add_row(point.name, *row)
    Console().print(table)
