"""The page in Chromium: no error, no request, and readable on phones, in the dark and on paper."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from treeify.report.api import Report

HERE = Path(__file__).parent
MODULES = HERE.parents[1] / "examples" / "web"


def _lacking() -> str | None:
    for command in ("chromium", "node"):
        if shutil.which(command) is None:
            return f"{command} is not installed"
    if not (MODULES / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is not installed: npm ci in examples/web"
    return None


pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(_lacking() is not None, reason=str(_lacking())),
]


def browse(page: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What a browser says of a page, see page.mjs; it is the only thing that was requested."""
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    asked = {
        "file": str(file),
        "modules": str(MODULES),
        "chromium": shutil.which("chromium"),
        "profile": str(folder / "profile"),
        "open": True,
        **options,
    }
    command = ["node", str(HERE / "page.mjs"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert not seen["errors"]
    assert seen["requests"] == [file.as_uri()]
    return seen


def check_readable(seen: dict[str, Any], least: float) -> None:
    """Nothing is too wide, cut off, faint, over something else, or smaller than some pixels."""
    assert seen["overflow"] <= 0
    assert not seen["wide"]
    assert not seen["outside"]
    assert not seen["overlapping"]
    assert not seen["faint"]
    assert seen["smallest"] >= least


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_phone(html: str, tmp_path: Path, *, dark: bool) -> None:
    seen = browse(html, tmp_path, width=375, dark=dark)
    assert seen["charts"] == 21
    assert (seen["paper"] < 0.1) == dark
    check_readable(seen, 7.5)


def test_it_is_readable_on_a_wide_screen(html: str, tmp_path: Path) -> None:
    check_readable(browse(html, tmp_path, width=1400), 10)


def test_it_is_printed_on_white_even_from_the_dark(html: str, tmp_path: Path) -> None:
    # A4 without its margins.
    seen = browse(html, tmp_path, width=718, dark=True, print=True)
    assert seen["paper"] == 1
    check_readable(seen, 8)


def test_names_that_are_long_or_hostile_do_not_break_it(report: Report, tmp_path: Path) -> None:
    (result,) = report.contents.results
    answers = result.answers
    assert answers is not None
    classes = tuple(f"<script>throw {index}</script> of a very long name" for index in range(10))
    named = replace(result, name="x" * 200, answers=replace(answers, classes=classes))
    other = replace(named, name="<img src=x onerror=alert(1)>")
    contents = replace(report.contents, results=(named, other))
    seen = browse(Report(contents).html(), tmp_path, width=375)
    check_readable(seen, 7.5)
