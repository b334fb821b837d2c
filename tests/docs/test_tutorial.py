"""The tutorial's commands and blocks run, one after the other, as a reader would run them."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from runner import run

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What makes the commands take seconds.
QUICK = {
    "train": ["schedule.epochs=1", "schedule.warmup_epochs=0", "workers=0"],
    "eval": ["--no-latency"],
    "calibrate": ["--no-tune", "--repeats", "10"],
    "export": ["--no-tune"],
}


def commands(listing: str) -> list[list[str]]:
    """The words of each line, where a backslash goes on with the next."""
    return [shlex.split(line) for line in listing.replace("\\\n", " ").splitlines()]


@pytest.mark.thorough
def test_the_tutorial_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "path_importer_cache", {})  # what it says of "." ends with the test
    monkeypatch.setitem(sys.modules, "mine", None)  # and what is there before comes back
    del sys.modules["mine"]
    names: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    for kind, text in BLOCK.findall(TUTORIAL.read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(text, TUTORIAL.name, "exec"), names)
            continue
        for program, command, *arguments in commands(text):
            if program == "pip":
                continue
            done = run(command, *arguments, *QUICK.get(command, []))
            assert done.exit_code == 0, f"{command} {arguments}\n{done.output}"
            outputs[command] = done.output
    assert {*outputs} == {
        *("plan", "convert", "train", "eval", "calibrate", "report", "predict", "export")
    }
    assert "--splits middle:2,middle.1:2,late:2" in outputs["plan"]  # as the page says
    assert Path("report.html").is_file()
    assert Path("answers.csv").is_file()


def test_the_tutorial_hands_on_what_it_plans() -> None:
    page = TUTORIAL.read_text(encoding="utf-8")
    splits = set(re.findall(r"splits[= ](\S+:2\S*)", page))
    assert splits == {"middle:2,middle.1:2,late:2"}
