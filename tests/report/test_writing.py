"""Without its packages there is no report, and the message says how to install them."""

import subprocess
import sys
from typing import Any

import pytest

import treeify
from treeify.errors import InputError
from treeify.report import writing


@pytest.mark.parametrize(
    ("module", "package"), [("matplotlib", "matplotlib"), ("jinja2", "Jinja2")]
)
def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    found = writing.find_spec
    monkeypatch.setattr(writing, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(InputError, match=rf"reports need .*: {package}\..*\n.*treeify\[report\]"):
        reading: Any = treeify.report.read
        reading("run")


def test_matplotlib_is_imported_by_who_draws_alone() -> None:
    code = """
import sys, treeify, treeify.report, treeify.cli.app, treeify.report.writing
treeify.cli.app.load_command("report")
assert not {"matplotlib", "jinja2"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
