"""Writes the tables of docs/recipes.md: the recipe's sections, and options of data sets and losses.

`python docs/recipe_keys.py` after a key or an option was added or described anew.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from treeify import losses
from treeify.data import SOURCES
from treeify.training.recipe import Recipe
from treeify.training.sections import Section, section_in

PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- keys -->\n", "\n## Data sets\n"
OPTIONS = "<!-- options -->\n"


def descriptions(described: type[Section] | Callable[..., Any]) -> dict[str, str]:
    """What the docstring says of every key or option."""
    _, _, args = (inspect.getdoc(described) or "").partition("Args:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", args, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def tables(section: type[Section], above: str = "") -> Iterator[str]:
    """A section's table, and those of the sections in it."""
    known = descriptions(section)
    title = f"`{above}`" if above else "The recipe"
    summary = re.split(r"\n\n|\n    ", inspect.getdoc(section) or "")[0].replace("\n", " ")
    yield f"\n### {title}\n\n{summary}\n\n| key | default | |\n|---|---|---|\n"
    inner: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        below = section_in(field.annotation)
        if below is not None and not above:
            inner[name] = below
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        if below is not None and not field.is_required() and field.default is not None:
            default = "see below"
        yield f"| `{name}` | {default} | {known.get(name, '')} |\n"
    for name, below in inner.items():
        yield from tables(below, name)


def options(kind: str, functions: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
    """One table of the options of all registered functions of a kind."""
    yield f"\n| {kind} | option | default | |\n|---|---|---|---|\n"
    for name, function in functions.items():
        known = descriptions(function)
        for option in inspect.signature(function).parameters.values():
            if option.kind is option.KEYWORD_ONLY:
                required = option.default is option.empty
                default = "required" if required else f"`{_yaml(option.default)}`"
                yield f"| `{name}` | `{option.name}` | {default} | {known[option.name]} |\n"


def _yaml(value: object) -> str:
    return {"None": "null", "True": "true", "False": "false", "": '""'}.get(str(value), str(value))


def updated(page: str) -> str:
    """The page with its tables written again."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    after, _, _ = after.partition(OPTIONS)
    functions = (*options("data set", SOURCES), *options("loss", losses.LOSSES))
    return "".join((before, BEGIN, *tables(Recipe), end, after, OPTIONS, *functions))


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
