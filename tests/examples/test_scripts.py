"""Every script of examples/ runs by itself, says what it should, and is on the page of examples."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from runner import run

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# A line of each that shows that it did its work.
LAST_LINES = {
    "budgeted_batch": r"budget [\d,]+: [\d,]+ MACs on average, \d",
    "deadlines": r"ms: \d\.\d of 8 leaves, \d+ late",
    "export_and_run": r"as in PyTorch: True",
    "own_loss": r"4 leaves: \d",
    "own_module": r"loaded again: True",
    "plain_loop": r"loaded again: True",
}


def test_each_has_a_line_to_be_looked_for() -> None:
    assert [path.stem for path in EXAMPLES] == list(LAST_LINES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(LAST_LINES[path.stem], capfd.readouterr().out)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_on_the_page(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 65
    assert f"python examples/{path.name}" in source
    assert f"../examples/{path.name}" in (ROOT / "docs" / "examples.md").read_text("utf-8")


def test_a_recipe_takes_the_loss_as_its_example_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (ROOT / "examples" / "own_loss.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"^treeify (train .*)$", source, re.MULTILINE)
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "own_loss", None)  # and what is there before comes back
    del sys.modules["own_loss"]
    out = str(tmp_path / "run")
    done = run(*command.split(), "schedule.epochs=1", "schedule.warmup_epochs=0", "--out", out)
    assert done.exit_code == 0, done.output
    assert "emphasis: 2" in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
