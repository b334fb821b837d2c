"""Every Python block in README and docs runs, and prints what the text block after it says."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import timm
import torch
from PIL import Image
from runner import run

from treeify.models.builders import library_names
from treeify.parity import results

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # pages write files
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shirts", raising=False)
    Path("recipes").symlink_to(ROOT / "recipes")
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert any(kind == "python" for kind, _ in blocks)
    names: dict[str, object] = {}
    for position, (kind, text) in enumerate(blocks):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, f"{page.name} block {position}", "exec"), names)
        following = blocks[position + 1] if position + 1 < len(blocks) else ("", "")
        if following[0] == "text":
            assert printed.getvalue() == following[1]


# What makes the commands of pages take seconds, and lets them run one after another.
QUICK = {
    "train": ["schedule.epochs=1", "schedule.warmup_epochs=0", "workers=0", "model.splits=1"],
    "convert": ["--overwrite", "--no-verify"],
    "eval": ["--no-latency"],
    "calibrate": ["--no-tune", "--repeats", "10"],
    "export": ["--no-tune"],
    "benchmark": ["--repeats", "3"],
}


@pytest.fixture
def first_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with what pages for new users name, and the ensemble and run they make first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    page = (ROOT / "docs" / "your_model.md").read_text(encoding="utf-8")
    (source,) = re.findall(r'"""\n(.*?)"""', page, re.DOTALL)
    source = source.replace("num_classes=10", "num_classes=2")
    monkeypatch.delitem(sys.modules, "shirts", raising=False)
    Path("shirts.py").write_text(source)
    names: dict[str, Any] = {}
    exec(source, names)
    torch.save(names["net"]().state_dict(), "shirts.pth")
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "resnet18.pth")
    for folder in (Path("photos"), Path("other_photos")):
        runs.photos(folder, each=4)
        for part in folder.iterdir():
            (part / "dark").rename(part / "bag")
    Image.new("RGB", (20, 30)).save("photo.jpg")


@pytest.mark.usefixtures("first_hours")
@pytest.mark.parametrize("name", ["your_model", "your_data", "splits", "plan", "faq", "deploy"])
def test_commands_for_new_users_run(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    commands = re.findall(r"^treeify (\w+) ([^#\n]*)", page, re.MULTILINE)
    assert commands
    for command, rest in commands:
        rest = rest.replace("--pretrained", "--weights resnet18.pth")  # needs no network
        arguments = shlex.split(re.sub(r"resnet18(?!\.pth)", "test_resnet", rest))
        quick = [] if "--resume" in arguments else QUICK.get(command, [])
        done = run(command, *arguments, *quick)
        assert done.exit_code == 0, f"{command} {rest}\n{done.output}"


REPORT_QUICK = {
    "train": ["schedule.epochs=1"],
    "calibrate": ["--no-tune", "--repeats", "10"],
    "report": ["--no-latency", "--no-verify", "--overwrite"],
}


def test_commands_of_the_page_on_reports_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    Path("recipes").symlink_to(ROOT / "recipes")
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    commands = re.findall(r"^treeify (\w+) (.*)", page, re.MULTILINE)
    there = [rest for _, rest in commands if not re.search(r"my_ensemble|table1", rest)]
    assert len(there) >= 5
    for command, rest in commands:
        if rest in there:
            done = run(command, *shlex.split(rest), *REPORT_QUICK[command])
            assert done.exit_code == 0, f"{command} {rest}\n{done.output}"
    assert {path.name for path in tmp_path.glob("*.html")} == {"report.html", "both.html"}


def test_readme_names_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e . && treeify train recipes/digits_hne.yaml" in text
    assert 'pip install -e ".[test]" && pytest' in text


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_what_can_go_wrong_is_tested() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*shown by.*\|\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {
        name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)
    }
    assert rows
    for row in "".join(rows).splitlines():
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named, row
        assert named <= tests, named - tests


def test_files_that_pages_name_are_there() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "NOTES.md"):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:treeify|tests|benchmarks|docs|recipes|examples)/[\w./]*)`", text
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert "loaded again: True" in capsys.readouterr().out


def test_pages_show_what_was_measured() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    assert {page.name for page in tables["PAGES"]} == {"README.md", "performance.md"}
    for path in tables["PAGES"]:
        page = path.read_text(encoding="utf-8")
        assert tables["updated"](page) == page, "run python benchmarks/tables.py"


def test_the_recipes_page_has_every_key() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "recipe_keys.py"))
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert generator["updated"](page) == page, "run python docs/recipe_keys.py"
    listed = {path.stem for path in (ROOT / "recipes").rglob("*.yaml")}
    assert all(f"{name}.yaml" in page for name in listed)


def test_the_pages_of_results_show_the_raw_metrics() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "result_tables.py"))
    pages = sorted((ROOT / "docs" / "results").glob("*.md"))
    assert pages
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert ".json" in page
        assert generator["updated"](page) == page, "run python docs/result_tables.py"


def test_the_coverage_page_shows_the_rows() -> None:
    generator = runpy.run_path(str(ROOT / "benchmarks" / "coverage.py"))
    rows = list(results.shipped().newest().values())
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert rows
    libraries = ("timm", "torchvision")
    counted = {tuple(row.versions[library] for library in libraries) for row in rows}
    if counted != {tuple(results.versions()[library] for library in libraries)}:
        pytest.skip(f"the names of {libraries} were counted under {counted}")
    assert generator["updated"](page, rows, library_names()) == page, (
        "run python benchmarks/coverage.py"
    )
