"""`treeify report`: what runs, ensembles, exports and grids reached, as one page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from treeify.cli.options import Device, Json, Trust, Weights
from treeify.cli.output import print_json, say
from treeify.models.hub import local_path
from treeify.report import writing


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_DIR...",
            parser=local_path,
            help="Run directories or checkpoints, saved ensembles, exports, and directories of"
            " treeify ablate; also hf-hub:org/name@revision.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; by default report.html, unless --figures is given."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of a recipe's data section to set; may be repeated. A run directory knows"
            " its data.",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Of the page; by default what it is of.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="published",
            help="Add the points that papers on anytime models print for the same data set.",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY", help="Write each figure by itself, too, there: new or empty."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="Of these files: svg, pdf or png.")] = "svg",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over what is there.")
    ] = False,
    weights: Weights = None,
    latency: Annotated[
        bool,
        typer.Option("--latency/--no-latency", help="Time answers for one image, about 3 seconds."),
    ] = True,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the parity check.")] = False,
    trust: Trust = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show what runs, ensembles, exports and grids reached: one page of figures and numbers.

    The page is one file of HTML without scripts, and fetches nothing. It measures each ensemble on
    its held-out images, and says what is left out because it is not known. Directories of treeify
    ablate are drawn as bands over their seeds.

    For example:

        treeify report runs/digits_hne

        treeify report runs/digits_hne runs/other exported/digits_hne --out both.html

        treeify report my_ensemble --data name=image_folder --data root=photos

        treeify report runs/ablation --figures figures --format pdf
    """
    writing.require_packages()
    if out is None and figures is None:
        out = Path("report.html")
    # Refused before anything is measured.
    if out is not None:
        writing.check_page(out, overwrite=overwrite)
    writing.check_format(format)
    if figures is not None:
        writing.check_folder(figures, overwrite=overwrite)
    from treeify.report.api import read

    console = Console(quiet=as_json)
    with console.status("measuring"):
        found = read(
            *directories,
            data=data or (),
            beside=beside,
            latency=latency,
            verify=not no_verify,
            trust=trust,
            device=device,
            weights=weights,
        )
    written = []
    with console.status("drawing"):
        if out is not None:
            written.append(found.write(out, title, overwrite=overwrite))
        if figures is not None:
            written += found.write_figures(figures, format, overwrite=overwrite)
    if as_json:
        print_json({"written": written, "sections": found.numbers()})
    for section in found.sections:
        charts = len(section.charts)
        say(console, f"{section.title}: {charts} figure{'' if charts == 1 else 's'}")
        for sentence in (*section.warnings, *section.missing):
            say(console, f"  {sentence}", style="yellow")
    if figures is not None:
        say(console, f"{len(found.charts)} figures written to {figures}")
    if out is not None:
        say(console, f"Written to {out}")
