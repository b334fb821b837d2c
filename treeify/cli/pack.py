"""`treeify pack`: files of trained weights in, an ensemble with a leaf of each out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from treeify.cli.convert import present, target
from treeify.cli.options import InputSize, Json, Name, NoVerify, NumClasses, Out, Overwrite, Trust
from treeify.cli.output import say
from treeify.conversion.api import pack as pack_networks
from treeify.models.base_model import base_model


def pack(
    name: Name,
    weights: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Trained weights, a network each, in the order of the leaves: files, or"
            " directories of ensembles, of which leaf 0 is taken, also as hf-hub:org/name.",
        ),
    ],
    splits: Annotated[
        str,
        typer.Option(
            help="As for treeify convert: their fanouts' product is the number of networks, so"
            " splits that name none share the one that fits."
        ),
    ],
    trust: Trust = False,
    num_classes: NumClasses = None,
    input_size: InputSize = None,
    out: Out = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Pack trained networks of one architecture into an ensemble.

    Leaf 0 has the first network's weights, and so on; what leaves share comes from the first of
    them. Split at 'input' and nothing is shared: every leaf is its network, exactly.

    For example:

        treeify pack resnet18 a.pth b.pth c.pth d.pth --splits input --num-classes 10

        treeify pack my_package.models:tiny a.pth b.pth --splits head --out two_heads
    """
    out = target(name, out, overwrite)
    console = Console(quiet=as_json)
    with console.status("reading and converting"):
        base = base_model(name, num_classes, input_size)
        hne = pack_networks(weights, splits, base.example, base.architecture, trust=trust)
    say(console, *base.notes)
    present(hne, base.architecture, console, out, overwrite, no_verify, as_json)
