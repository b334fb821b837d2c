"""Text from files, which may say anything, as part of a page of Markdown."""

import re
from collections.abc import Iterable, Sequence

from treeify.errors import printable

# What Markdown, or HTML within it, may take for more than a character.
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$<>&-])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def plain(value: object, most: int = 200) -> str:
    """A value as text that is read as it stands: in one line, and nothing in it is markup."""
    text = " ".join(printable(str(value)).split())
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return _SPECIAL.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), text)


def literal(value: object) -> str:
    """A value as code in a line; what would end it is left out."""
    return f"`{' '.join(printable(str(value)).replace('`', '').split())}`"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown; numbers stand on the right."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
