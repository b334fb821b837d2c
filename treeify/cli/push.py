"""`treeify push`: an ensemble in, a repository of the Hugging Face hub out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from treeify.cli.options import Json, SavedEnsemble, Trust
from treeify.cli.output import print_json, say
from treeify.errors import InputError
from treeify.models.hub import Repository
from treeify.share.push import Pushed
from treeify.share.push import push as publish


def push(
    directory: SavedEnsemble,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Made if it is not there.")],
    extras: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="export,report",
            help="What else goes there: the answers as ONNX files, a page of figures, or both.",
        ),
    ] = None,
    as_timm: Annotated[
        int | None,
        typer.Option(
            metavar="LEAF",
            min=0,
            help="Write this leaf alone, as a plain model of timm's, instead of the ensemble.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of a recipe's data section to set, to measure accuracy on; may be repeated. A"
            " run directory knows its data.",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Of the weights, such as apache-2.0."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="The hub's name of the weights it began with, such as timm/resnet18.a1_in1k.",
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Make one that only its owners see; a public one is refused."
        ),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; by default the main one.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder only, and ask the hub for nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write it, new or empty; with --dry-run pushed/NAME."),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Publish an ensemble on the Hugging Face hub, with a card of what was measured.

    Everything is written and checked here first, and goes there in one commit. Paths of this
    machine are left out. What is there is read by `treeify.load("hf-hub:ORG/NAME")`, and by every
    command that takes a directory.

    For example:

        treeify push runs/digits_hne me/digits --dry-run

        treeify push runs/digits_hne me/digits --license apache-2.0 --with export,report

        treeify push my_ensemble me/leaf --as-timm 0 --private

        treeify predict hf-hub:me/digits digit.png
    """
    console = Console(quiet=as_json)
    with console.status("reading") as status:
        pushed = publish(
            directory,
            repository,
            extras=_names(extras),
            as_timm=as_timm,
            data=data or (),
            licence=licence,
            base_model=base_model,
            private=private,
            revision=revision,
            create_pr=create_pr,
            dry_run=dry_run,
            out=out,
            trust=trust,
            observe=status.update,
        )
    if as_json:
        print_json(pushed)
    say(console, *_summary(pushed, is_timm=as_timm is not None))


def _names(extras: str | None) -> list[str]:
    """What `--with` names."""
    names = [] if extras is None else [name.strip() for name in extras.split(",")]
    if not all(names):
        raise InputError(
            f"--with {extras!r} names nothing.",
            expected="export, report, or export,report",
            next_step="Leave it out for the ensemble and its card alone.",
        )
    return names


def _summary(pushed: Pushed, *, is_timm: bool) -> list[str]:
    lines = [f"{path.as_posix()}" for path in pushed.files]
    if pushed.folder is not None:
        lines.append(f"Written to {pushed.folder}; README.md is the card.")
    if pushed.url is None:
        lines.append("A dry run: nothing was sent.")
        return lines
    lines.append(f"Pushed: {pushed.url}")
    source = str(Repository(pushed.repository, revision=pushed.revision))
    use = (
        f"timm.create_model({source!r}, pretrained=True)"
        if is_timm
        else f"treeify.load({source!r})"
    )
    return [*lines, f"Load it: {use}"]
