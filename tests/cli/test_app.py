"""The command itself: help, version, and what a user sees when something fails."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from runner import run

from treeify.cli import app as cli
from treeify.errors import SplitError


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name, (_, line) in cli.COMMANDS.items():
        assert name in result.stdout
        assert line.split(",")[0] in result.stdout


def test_without_arguments_help_is_shown() -> None:
    assert "Commands" in run().output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert cli.COMMANDS[name][1].split(",")[0] in result.stdout
    assert f"treeify {name} " in result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_overview_says_what_the_command_says(name: str) -> None:
    assert cli.load_command(name).help.splitlines()[0] == cli.COMMANDS[name][1]


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"treeify {version('treeify')}"


def test_an_unknown_command_is_refused() -> None:
    result = run("convrt")
    assert result.exit_code == 2
    assert "No such command 'convrt'" in result.stderr


def failing(error: BaseException) -> object:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SplitError("[name] is unknown.", expected="[bold]x[/]"), 2, "SplitError: [name] is un"),
        (ValueError("too [big]"), 1, "ValueError: too [big]"),
        (AssertionError(), 1, "AssertionError: no message"),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_messages_with_an_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treeify.cli.splits.splits", failing(error))
    result = run("splits")
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert ("--debug" in result.stderr) == (code == 1)


def test_debug_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.cli.splits.splits", failing(SplitError("no.")))
    result = run("--debug", "splits")
    assert isinstance(result.exception, SplitError)


def test_the_installed_command(tmp_path: Path) -> None:
    treeify = Path(sys.executable).with_name("treeify")
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run(
        [treeify, "convert", "resnet5O"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "ModelError: there is no model 'resnet5O'." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_clone_beside_a_script_does_not_hide_the_package(tmp_path: Path) -> None:
    """Such a directory is a namespace package, before which an editable install has to come."""
    (tmp_path / "treeify").mkdir()
    script = tmp_path / "script.py"
    script.write_text("import treeify\nprint(treeify.__file__)\n")
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(result.stdout.strip()).name == "__init__.py"


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets an entry whenever the allocator would be tuned; `splits` does nothing."""
    calls: list[bool] = []
    monkeypatch.setattr("treeify.cli.app.tune_allocator", lambda: calls.append(True))
    monkeypatch.setattr("treeify.cli.splits.splits", lambda: None)
    return calls


@pytest.mark.parametrize(
    ("words", "variable", "times"),
    [
        (["splits"], None, 1),
        (["--debug", "splits"], None, 1),
        (["--no-tune-allocator", "splits"], None, 0),
        (["splits"], "0", 0),
        (["--tune-allocator", "splits"], "0", 1),
        (["splits", "--help"], None, 0),
        (["--help"], None, 0),
    ],
    ids=str,
)
def test_the_allocator_is_tuned_where_a_command_runs(
    words: list[str],
    variable: str | None,
    times: int,
    tuned: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is None:
        monkeypatch.delenv("TREEIFY_TUNE_ALLOCATOR")
    else:
        monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", variable)
    assert run(*words).exit_code == 0
    assert len(tuned) == times


def test_the_overview_does_not_wait_for_torch() -> None:
    code = "import sys, treeify.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
