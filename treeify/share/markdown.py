"""Text from files, which may say anything, as part of a page of Markdown."""

import re
from collections.abc import Iterable, Sequence

from treeify.errors import printable

# What Markdown takes for more than a character within a line, HTML within it, and what becomes a
# link or a mention by itself.
_SPECIAL = re.compile(r"[\\`*_{}\[\]|~$<>&@]|:(?=//)|\.(?<=www\.)", re.IGNORECASE)
_ESCAPED = "\\`*_{}[]|~$"


def plain(value: object, most: int = 200) -> str:
    """A value as text that is read as it stands, within a line; nothing in it is markup."""
    text = printable(" ".join(str(value).split()))
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return _SPECIAL.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return f"\\{character}" if character in _ESCAPED else f"&#{ord(character)};"


def literal(value: object) -> str:
    """A value as code in a line; what would end it is left out."""
    return f"`{' '.join(printable(str(value)).replace('`', '').split())}`"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown; numbers stand on the right."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
