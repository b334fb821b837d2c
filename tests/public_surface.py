"""What users write and read, as text: names with signatures, commands, keys of recipes.

`python tests/public_surface.py` writes `public_surface.txt` again after a change on purpose, so
that its diff shows it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import treeify
from treeify.cli.app import COMMANDS, app, load_command
from treeify.training.recipe import Recipe
from treeify.training.sections import Section, section_in

FILE = Path(__file__).with_suffix(".txt")


def surface() -> str:
    """All of it."""
    return "\n".join([*_python(), *_command_line(), *_recipe(Recipe, ""), ""])


def _python() -> Iterator[str]:
    yield "# treeify.__all__"
    for name in sorted(treeify.__all__):
        value = getattr(treeify, name)
        if inspect.ismodule(value) or isinstance(value, str):
            yield f"{name}: {type(value).__name__}"
            continue
        yield _signature(name, value)
        for member, own in sorted(_members(value).items()):
            if isinstance(own, property):
                yield f"  {name}.{member}: property"
            elif not member.startswith("_") and callable(own):
                yield f"  {_signature(f'{name}.{member}', own)}"


def _members(value: Any) -> dict[str, Any]:
    """What a class defines, and what it inherits from others of ours."""
    classes = reversed(value.__mro__) if inspect.isclass(value) else ()
    ours = [vars(kind) for kind in classes if kind.__module__.startswith("treeify.")]
    return {name: member for members in ours for name, member in members.items()}


def _signature(name: str, value: Any) -> str:
    # Types by their last name, postponed or not: modules may move.
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value)))
    return name + re.sub(r"\b(?:[A-Za-z]\w*\.)+(\w+)", r"\1", text)


def _command_line() -> Iterator[str]:
    yield from _command("treeify", typer.main.get_command(app))
    for name in COMMANDS:
        yield from _command(f"treeify {name}", load_command(name))


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"\n# {name}"
    yield inspect.cleandoc(command.help or "")
    for option in command.params:
        words = " ".join((*option.opts, *option.secondary_opts))
        kind = "..." if option.nargs < 0 or getattr(option, "multiple", False) else ""
        metavar = f" {option.metavar}" if option.metavar else ""
        default = "" if option.required else f" [{option.default}]"
        yield f"  {words}{metavar}{kind}{default}: {option.help or ''}"


def _recipe(section: type[Section], above: str) -> Iterator[str]:
    if not above:
        yield "\n# keys of recipes"
    for name, field in section.model_fields.items():
        path = f"{above}.{name}" if above else name
        below = section_in(field.annotation)
        default = "required" if field.is_required() else repr(field.default)
        yield f"  {path}: {'section' if below else default}"
        if below is not None:
            yield from _recipe(below, path)


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
