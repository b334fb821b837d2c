"""Runs the command line inside the test process."""

from typing import Any

from typer.testing import CliRunner

from treeify.cli.app import app


def run(*arguments: str, columns: int = 200) -> Any:
    """The result of `treeify ARGUMENTS`, on a wide terminal without colours."""
    return CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(app, list(arguments))
