"""The page of examples/web prepares pictures and answers as Python does, file by file."""

import base64
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import tiny_exports
import torch
from PIL import Image
from web_server import PAGE, Server, serving

import treeify
from treeify.data import Preparation, digits
from treeify.data.preparation import PREPARATION
from treeify.deploy import export
from treeify.deploy.runtime import Anytime
from treeify.models import cifar_resnet50

HERE = Path(__file__).parent
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with noise on them, opaque."""
    generator = np.random.default_rng(width * height)
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([rows / height, columns / width, (rows + columns) / (width + height)], axis=2)
    noise = generator.normal(0, 0.15, ramps.shape)
    return Image.fromarray(((ramps + noise) * 255).clip(0, 255).astype(np.uint8))


@needs_node
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pictures_are_prepared_bit_for_bit_as_in_python(crop_mode: Any) -> None:
    # Where heights shrink much more than widths, Pillow 13 resizes columns first; older ones not.
    tall = (33, 20) if crop_mode == "squash" else (20, 33)
    resizings: Any = itertools.product(
        ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
        [(8, 8), (15, 22), (64, 64)],
        [1.0, 0.875, 1.25],
        [(8, 8), (61, 44), tall],
    )
    cases = []
    for index, (interpolation, size, crop_pct, picture) in enumerate(resizings):
        preparation = Preparation(
            size=size,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            channels=(1, 3)[index % 2],
            crop_mode=crop_mode,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )
        cases.append((photo(*picture), preparation))
    asked = [
        {
            "rgba": base64.b64encode(image.convert("RGBA").tobytes()).decode(),
            "width": image.width,
            "height": image.height,
            "preparation": PREPARATION.dump_python(preparation, mode="json"),
        }
        for image, preparation in cases
    ]
    done = subprocess.run(
        ["node", HERE / "web_prepare.mjs", PAGE / "prepare.js"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    for (image, preparation), line in zip(cases, done.stdout.split(), strict=True):
        values = np.frombuffer(base64.b64decode(line), np.float32).reshape(preparation.shape)
        assert torch.equal(torch.from_numpy(values.copy()), preparation(image)), preparation


def test_the_readmes_pictures_are_the_ones_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (PAGE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    exec(compile(block, "README.md", "exec"), {})
    shipped = sorted((PAGE / "pictures").iterdir())
    assert [file.name for file in shipped] == [f"{digit}.png" for digit in range(10)]
    for file in shipped:
        with Image.open(file) as expected, Image.open(Path("pictures") / file.name) as made:
            assert made.mode == expected.mode
            assert made.tobytes() == expected.tobytes()


def test_the_page_names_no_other_server() -> None:
    files = [*PAGE.glob("*.js"), *PAGE.glob("*.html"), *PAGE.glob("*.css"), *PAGE.glob("*.json")]
    assert len(files) >= 8
    for file in files:
        assert not re.findall(r"(?:https?:)?//[a-z][\w-]*\.\w", file.read_text(encoding="utf-8"))


def _lacking() -> str | None:
    """What a browser test lacks here."""
    if shutil.which("chromium") is None:
        return "chromium is not installed"
    for package in ("onnxruntime-web", "playwright-core"):
        if not (PAGE / "node_modules" / package).is_dir():
            return f"{package} is not installed: npm ci in examples/web"
    return None


def in_browser(test: Any) -> Any:
    """Mark a test that takes seconds, and a browser."""
    lacking = _lacking()
    return pytest.mark.thorough(pytest.mark.skipif(lacking is not None, reason=str(lacking))(test))


def browse(server: Server, profile: Path, scenario: str, **options: Any) -> dict[str, Any]:
    """What a browser reports of the page, see web_page.mjs."""
    asked = {
        "scenario": scenario,
        "page": str(PAGE),
        "chromium": shutil.which("chromium"),
        "profile": str(profile),
        "address": server.address,
        "export": "exported/digits",
        **options,
    }
    command = ["node", str(HERE / "web_page.mjs"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert "failed" not in report, report
    hosts = {urlsplit(url).netloc for url in report["requests"] if not url.startswith("blob:")}
    assert hosts == {urlsplit(server.address).netloc}
    return report


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an export of a network like the recipe's, with random weights."""
    pytest.importorskip("onnxruntime")
    data = digits()
    torch.manual_seed(0)
    base = cifar_resnet50(num_classes=10, width=0.25, layers=[1, 1, 1, 1])
    hne = treeify.hierarchicalize(
        base, splits=["block3", "block4"], init="fresh", example_input=data.example()[None]
    )
    hne.preparation = data.preparation
    root = tmp_path_factory.mktemp("exports")
    export(hne.eval(), root / "digits", tune=False)
    return root


@in_browser
def test_the_first_answer_is_there_before_the_other_files(exports: Path, tmp_path: Path) -> None:
    waiting = frozenset(file.name for file in (exports / "digits").glob("step-*.onnx"))
    waiting -= {"step-01.onnx"}
    with serving(exports, waiting) as server:
        seen = browse(server, tmp_path, "first")
    assert not seen["errors"]
    before, after = seen["before"], seen["after"]
    assert [row["state"] for row in before["rows"]] == ["answered", "waiting", "waiting"]
    assert "by 1 of 4 leaves" in before["answer"]
    assert re.fullmatch(r"\d+ kB of \d+ kB fetched", before["fetched"])
    assert [row["state"] for row in after["rows"]] == ["answered"] * 3
    assert "by all 4 leaves" in after["answer"]
    assert after["fetched"].startswith("All ")


@in_browser
def test_a_slow_connection_shows_how_much_has_come(exports: Path, tmp_path: Path) -> None:
    with serving(exports) as server:
        seen = browse(server, tmp_path, "underway")
    assert not seen["errors"]
    assert [row["state"] for row in seen["rows"]] == ["answered", "answered", "fetching"]
    assert re.search(r"\d+ kB of \d+ kB$", seen["rows"][-1]["text"])
    assert "by 2 of 4 leaves" in seen["answer"]


@in_browser
def test_answers_equal_pythons(exports: Path, tmp_path: Path) -> None:
    with serving(exports) as server:
        seen = browse(server, tmp_path, "logits")
    assert not seen["errors"]
    model = Anytime(exports / "digits", threads=1)
    expected = list(model.anytime(model.open(PAGE / "pictures" / "3.png")))
    assert [step["leaves"] for step in seen["steps"]] == [1, 2, 4]
    for step, answer in zip(seen["steps"], expected, strict=True):
        np.testing.assert_allclose(step["logits"], answer.logits[0], rtol=1e-4, atol=1e-4)
    assert sure(seen["answer"]) == expected_of(exports / "digits", PAGE / "pictures" / "3.png")
    files = [row["bytes"] for row in model.manifest["steps"]]
    assert [step["bytes"] for step in seen["steps"]] == list(itertools.accumulate(files))


@in_browser
def test_everything_can_be_done_from_the_keyboard(exports: Path, tmp_path: Path) -> None:
    with serving(exports) as server:
        seen = browse(server, tmp_path, "keyboard")
    assert not seen["errors"]
    assert seen["drawing"]["what"] == "board"
    assert seen["drawn"]["pen"] == "Pen down"
    assert seen["drawn"]["changed"]
    assert "by all 4 leaves" in seen["drawn"]["answer"]
    assert seen["cleared"] == "None yet."
    assert seen["pressed"] == "A scanned 1"
    assert all(stop["outlined"] and stop["name"] for stop in seen["stops"]), seen["stops"]


@in_browser
def test_a_small_screen_scrolls_in_one_direction_only(exports: Path, tmp_path: Path) -> None:
    with serving(exports) as server:
        seen = browse(server, tmp_path, "narrow", width=375, height=667)
    assert not seen["errors"]
    assert seen["overflows"] == {"shipped": 0, "drawing": 0, "file": 0}
    assert not seen["small"]
    assert "by all 4 leaves" in seen["drawn"]


def sure(answer: str) -> list[str]:
    """The class and the probability that the page shows, before its words."""
    return answer.removesuffix(" % sure, by all 4 leaves").rsplit(" ", 1)


def expected_of(export: Path, file: Path) -> list[str]:
    """What the page should show of a picture."""
    model = Anytime(export, threads=1)
    probabilities = torch.from_numpy(model.predict(model.open(file))[0]).softmax(0)
    best = int(probabilities.argmax())
    name = model.classes[best] if model.classes else f"class {best}"
    return [name, f"{100 * probabilities[best]:.1f}"]


@in_browser
def test_a_file_is_resized_for_the_network(exports: Path, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    photo(61, 44).save(file)
    with serving(exports) as server:
        seen = browse(server, tmp_path / "profile", "file", file=str(file), size="8 x 8 pixels")
    assert not seen["errors"]
    assert seen["kinds"]
    assert not seen["pressed"]
    assert sure(seen["answer"]) == expected_of(exports / "digits", file)


@in_browser
@pytest.mark.parametrize("classes", [None, ["a <b>", "c", "d", "e", "a name of several words"]])
def test_other_exports_take_files_only(classes: list[str] | None, tmp_path: Path) -> None:
    tiny_exports.write(tmp_path / "exports" / "tiny", classes=classes)
    file = tmp_path / "photo.png"
    photo(61, 44).save(file)
    with serving(tmp_path / "exports") as server:
        options = {"export": "exported/tiny", "file": str(file), "size": "4 x 4 pixels"}
        seen = browse(server, tmp_path / "profile", "file", **options)
    assert not seen["errors"]
    assert not seen["kinds"]
    assert sure(seen["answer"]) == expected_of(tmp_path / "exports" / "tiny", file)


@in_browser
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"output": "pair"}, "one tensor of logits"),
        ({"version": 2}, "format treeify-export, version 2"),
        ({"preparation": None}, "does not say how images are prepared"),
    ],
    ids=["outputs", "version", "preparation"],
)
def test_what_the_page_cannot_run_is_explained(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    tiny_exports.write(tmp_path / "exports" / "tiny", **options)
    with serving(tmp_path / "exports") as server:
        seen = browse(server, tmp_path / "profile", "problem", export="exported/tiny")
    assert not seen["errors"]
    assert not seen["rows"]
    assert problem in seen["problem"]


@in_browser
def test_a_damaged_file_is_named_and_answers_before_it_stay(exports: Path, tmp_path: Path) -> None:
    shutil.copytree(exports / "digits", tmp_path / "exports" / "digits")
    damaged = tmp_path / "exports" / "digits" / "step-02.onnx"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with serving(tmp_path / "exports") as server:
        seen = browse(server, tmp_path / "profile", "problem")
    assert not seen["errors"]
    assert "step-02.onnx is damaged or of another export" in seen["problem"]
    assert [row["state"] for row in seen["rows"]][:2] == ["answered", "fetched"]


@in_browser
def test_an_export_that_is_not_there_is_explained(exports: Path, tmp_path: Path) -> None:
    with serving(exports) as server:
        seen = browse(server, tmp_path, "problem", export="exported/other")
    assert all("404" in error for error in seen["errors"])
    assert "exported/other/ensemble.json cannot be fetched" in seen["problem"]
    assert "treeify export" in seen["problem"]


@in_browser
def test_a_missing_runtime_is_explained(exports: Path, tmp_path: Path) -> None:
    with serving(exports) as server:
        seen = browse(server, tmp_path, "problem", blocked="**/onnxruntime-web/**")
    assert all("Failed to load resource" in error for error in seen["errors"])
    assert "ONNX Runtime Web is not there" in seen["problem"]
    assert "npm ci" in seen["problem"]
