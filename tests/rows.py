"""Rows of coverage files."""

from treeify.parity import results
from treeify.parity.results import Row


def row(name: str, **fields: object) -> Row:
    """A row of the installed versions and the usual splits."""
    return Row(name=name, versions=results.versions(), asked="2", **fields)
