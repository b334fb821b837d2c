"""The README of an export: its own names and numbers, in programs that run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import saved_ensembles as saved
from PIL import Image

import treeify
from treeify.deploy.exporter import export
from treeify.deploy.readme import readme


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    saved.save(folder / "ensemble")
    saved.export(folder / "ensemble", folder / "digits")
    return folder / "digits"


@pytest.fixture(scope="module")
def manifest(exported: Path) -> Any:
    return json.loads((exported / "ensemble.json").read_text("utf-8"))


def block(page: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return found


def test_an_export_has_it(exported: Path, manifest: Any) -> None:
    page = readme(manifest)
    assert (exported / "README.md").read_text("utf-8") == page
    assert "$" not in page
    for step in manifest["steps"]:
        assert f"`{step['file']}`" in page
        assert f"{step['macs']:,}" in page
        names = [value["name"] for value in (*step["inputs"], *step["outputs"])]
        assert all(f'"{name}"' in block(page, "cpp") for name in names)
    assert "0.3053" in page  # how digits are normalised


def test_its_python_runs_beside_the_export(exported: Path) -> None:
    Image.new("RGB", (20, 30)).save(exported / "photo.jpg")
    program = block((exported / "README.md").read_text("utf-8"), "python")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("deadline=0.02", "deadline=60.0")],
        cwd=exported,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["1", "3", "6"]
    assert lines[-1] == "[6] True"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node to read JavaScript")
def test_its_javascript_can_be_read(manifest: Any, tmp_path: Path) -> None:
    file = tmp_path / "steps.mjs"
    file.write_text(block(readme(manifest), "js"), encoding="utf-8")
    done = subprocess.run(
        ["node", "--check", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    x = torch.rand(2, 4)
    hne = treeify.hierarchicalize(net, ["2"], init="fresh", example_input=x).eval()
    page = (export(hne, tmp_path / "out", batch=2, tune=False).path / "README.md").read_text(
        "utf-8"
    )
    assert "not known" in page
    assert "Exactly 2 images" in page
    assert "numpy.zeros((2, 4)" in page
