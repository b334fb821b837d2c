"""The runtime needs neither torch nor treeify: one file, numpy and an engine."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny_exports
from numpy.testing import assert_allclose
from PIL import Image

from treeify.deploy import runtime

FILE = Path(runtime.__file__)

# Refuses what is installed here and would not be there.
PREAMBLE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocker())
"""
ALONE = """
from anytime import Anytime
import numpy as np

model = Anytime("tiny", threads=1)
images = np.load("images.npy")
np.save("logits.npy", model.predict(images))
model.calibrate(images, repeats=2)
assert model.predict(images, deadline=60.0).met
model.predict(images, confidence=0.5)
assert model.open("picture.png").shape == (1, 3, 4, 4)
"""
INSIDE = """
from treeify.deploy.runtime import Anytime
import treeify.deploy
Anytime("tiny", threads=1)
assert "torch" not in sys.modules
"""


def _run(code: str, blocked: tuple[str, ...], where: Path) -> None:
    text = f"BLOCKED = {blocked}\n{PREAMBLE}\n{code}"
    path = str(FILE.parents[2]) if "treeify.deploy" in code else str(where)
    result = subprocess.run(
        [sys.executable, "-c", text],
        cwd=where,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_copied_file_answers_without_torch_and_treeify(tmp_path: Path) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny")
    shutil.copy(FILE, tmp_path / "anytime.py")
    images = tiny.images(3)
    np.save(tmp_path / "images.npy", images)
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    _run(ALONE, ("torch", "torchvision", "timm", "treeify", "pydantic", "onnx"), tmp_path)
    assert_allclose(np.load(tmp_path / "logits.npy"), tiny.logits(images), rtol=1e-5, atol=1e-6)


def test_the_module_is_imported_without_torch(tmp_path: Path) -> None:
    tiny_exports.write(tmp_path / "tiny")
    _run(INSIDE, ("torch", "torchvision", "timm"), tmp_path)


def test_it_imports_only_the_standard_library_numpy_and_what_runs_it() -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names.add(node.module.partition(".")[0])
    others = names - set(sys.stdlib_module_names)
    assert others == {"numpy", "onnxruntime", "openvino", "PIL"}
