"""A Sphinx directive that writes the reference of the command line from the commands themselves.

`commands` becomes a section for each command: how it is called, its help, and an `option` entry,
which other pages can refer to, for each of its arguments and options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from treeify.cli.app import COMMANDS, app, load_command


class Commands(SphinxDirective):
    """All commands, in the order of `treeify --help`."""

    def run(self) -> list[nodes.Node]:
        """Parse the reference where the directive stands."""
        text = "\n\n".join([*_command("treeify", typer.main.get_command(app)), *_subcommands()])
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _subcommands() -> Iterator[str]:
    for name in COMMANDS:
        yield from _command(f"treeify {name}", load_command(name))


def _command(name: str, command: Any) -> Iterator[str]:
    """A command's section, in MyST's Markdown."""
    context = command.context_class(command, info_name=name)
    usage = context.get_usage().removeprefix("Usage: ")
    yield f"## {name}"
    yield f"```\n{' '.join(usage.split())}\n```"
    yield _help(command)
    yield f"```{{program}} {name}\n```"
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        signature, text = parameter.get_help_record(context)
        signature = signature.replace(" / ", ", ")  # a switch and its opposite
        yield f"```{{option}} {signature}\n{text}\n```"


def _help(command: Any) -> str:
    """The help, with commands that follow one another in one listing."""
    return re.sub(r"(?<=\n)(    .*)\n\n(?=    )", r"\1\n", inspect.cleandoc(command.help))


def setup(app: Sphinx) -> dict[str, bool]:
    """Let pages use the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
