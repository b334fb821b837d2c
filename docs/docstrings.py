"""Sphinx reads docstrings as they are written: in Google's style, with listings as in Markdown.

reStructuredText takes an indented part for a quotation; in our docstrings it is a listing. Napoleon
takes what is before a colon in `Returns:` for a type; ours are words. And two modules have errors
of one name: what is raised is ours unless the export's runtime raises it.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

from treeify import errors

BEFORE_NAPOLEON, AFTER_NAPOLEON = 400, 600
RUNTIME = "treeify.deploy.runtime"


def mark_listings(
    app: Sphinx, what: str, name: str, owner: Any, options: Any, lines: list[str]
) -> None:
    """Put `::` before whatever is indented after an empty line."""
    marked: list[str] = []
    for line in lines:
        starts = line.startswith("    ") and marked[-1:] == [""]
        if starts and len(marked) > 1 and not marked[-2].startswith(" "):
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def name_errors(
    app: Sphinx, what: str, name: str, owner: Any, options: Any, lines: list[str]
) -> None:
    """Write out the module of errors that functions say they raise."""
    if name.startswith(RUNTIME):
        return
    for position, line in enumerate(lines):
        field, _, rest = line.removeprefix(":raises ").partition(":")
        if line.startswith(":raises ") and hasattr(errors, field):
            lines[position] = f":raises treeify.errors.{field}:{rest}"


def join_returns(
    app: Sphinx, kind: str, name: str, owner: Any, options: Any, lines: list[str]
) -> None:
    """Undo what napoleon makes of a colon in `Returns:`; types stand in signatures alone."""
    for position, line in enumerate(lines):
        if line.startswith(":rtype: "):
            start = next(at for at, text in enumerate(lines) if text.startswith(":returns: "))
            what = line.removeprefix(":rtype: ")
            lines[start] = lines[start].replace(":returns: ", f":returns: {what}: ", 1)
            del lines[position]
            return


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it with autodoc."""
    app.connect("autodoc-process-docstring", mark_listings, BEFORE_NAPOLEON)
    app.connect("autodoc-process-docstring", name_errors, AFTER_NAPOLEON)
    app.connect("autodoc-process-docstring", join_returns, AFTER_NAPOLEON)
    return {"parallel_read_safe": True}
