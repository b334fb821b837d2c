"""`treeify export`: what it writes, says and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from runner import run
from torch.testing import assert_close

import treeify
from treeify.data import DIGITS
from treeify.deploy.exporter import Progress
from treeify.deploy.runtime import Anytime

FILES = {"ensemble.json", "anytime.py", "README.md"}
FILES |= {f"step-0{number}.onnx" for number in (1, 2, 3)}


def test_a_run_is_exported_under_its_name(hne: Any) -> None:
    result = run("export", "run", "--trust", "--no-tune")
    assert result.exit_code == 0, result.output
    out = Path("exported/run")
    assert {file.name for file in out.iterdir()} == FILES
    for words in (
        *(f"step {number} of 3: largest difference" for number in (1, 2, 3)),
        f"{hne.count_macs(6) - hne.count_macs(3):,}",
        "step-03.onnx",
        f"treeify predict {out} image.jpg",
        "from anytime import Anytime",
        "any number of images",
    ):
        assert words in result.stdout
    manifest = json.loads((out / "ensemble.json").read_text("utf-8"))
    assert manifest["name"] == "run"
    # An earlier version saved the ensemble: the run's data set says how images are prepared.
    assert manifest["preparation"]["mean"] == pytest.approx(DIGITS[0])
    x = torch.rand(3, 3, 8, 8)
    logits = torch.from_numpy(Anytime(out, threads=1).predict(x.numpy()))
    assert_close(logits, hne.predict(x).detach(), rtol=1e-4, atol=1e-5)


def test_json_is_the_manifest(directories: Path) -> None:
    options = ("--no-tune", "--no-verify", "--sizes", "1,6", "--batch", "2", "--json")
    result = run("export", "alone", "--trust", "--out", "phone", *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    manifest = json.loads(result.stdout)
    assert manifest == json.loads(Path("phone/ensemble.json").read_text("utf-8"))
    assert manifest["sizes"] == [1, 6]
    assert manifest["images"]["shape"] == [2, 3, 8, 8]
    assert manifest["name"] == "alone"


def exporting(monkeypatch: pytest.MonkeyPatch, events: tuple[Progress, ...] = ()) -> dict[str, Any]:
    """The arguments that the library is called with, in the place of an export."""
    arguments: dict[str, Any] = {}

    def write(hne: Any, out: Path, *, observe: Any, **options: Any) -> Any:
        arguments.update(options, out=out)
        for event in events:
            observe(event)
        return SimpleNamespace(manifest=MANIFEST, quantisation=None)

    monkeypatch.setattr("treeify.cli.export.write", write)
    return arguments


STEP = {
    "file": "step-01.onnx",
    "leaves": 1,
    "bytes": 1_234_567,
    "macs": 7,
    "parameters": 8,
    "forms": {"level 0": "grouped", "level 1": "looped"},
    "parity": None,
}
MANIFEST = {"steps": [STEP], "images": {"shape": [4, 3, 8, 8]}}


@pytest.mark.usefixtures("directories")
def test_options_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = exporting(monkeypatch)
    assert run("export", "alone", "--trust").exit_code == 0
    assert arguments["sizes"] is None
    assert arguments["input_size"] is None
    assert (arguments["batch"], arguments["tune"], arguments["verify"]) == ("dynamic", True, True)
    assert arguments["out"] == Path("exported/alone")
    words = "--batch 4 --sizes 1,3 --input-size 8x16 --no-tune --no-verify --overwrite --out here"
    result = run("export", "run/last", "--trust", *words.split())
    assert result.exit_code == 0, result.output
    assert arguments == {
        "out": Path("here"),
        "sizes": (1, 3),
        "batch": 4,
        "input_size": (8, 16),
        "tune": False,
        "verify": False,
        "overwrite": True,
        "name": "run",
    }
    for words in ("1.23", "1 grouped, 1 looped", "4 at a time", "Not compared"):
        assert words in result.stdout


@pytest.mark.usefixtures("directories")
def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, (Progress(2, 5, "comparing", 0.5),))
    assert "step 2 of 5" not in run("export", "alone", "--trust").stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = run("export", "alone", "--trust")
    assert "step 2 of 5: comparing" in shown.stderr
    assert "ETA" in shown.stderr
    assert run("export", "alone", "--trust", "--json").stderr == ""


def test_eight_bits_are_calibrated_on_the_run_s_images(directories: Path) -> None:
    options = ("--no-tune", "--no-verify", "--sizes", "1,6", "--int8")
    result = run("export", "run", "--trust", *options, "--calibrate", "held_out=100")
    assert result.exit_code == 0, result.output
    for words in ("QDQ", "accuracy %", "same class %", "100 held-out images"):
        assert words in result.stdout
    manifest = json.loads(Path("exported/run/ensemble.json").read_text("utf-8"))
    assert manifest["quantised"]["calibrated_on"]["images"] == 256
    assert "quantised to 8 bits" in Path("exported/run/README.md").read_text("utf-8")
    scores = run("eval", "exported/run", "--data", "name=digits", "--json", "--no-latency")
    assert scores.exit_code == 0, scores.output


@pytest.mark.usefixtures("directories")
def test_images_to_calibrate_on_are_those_of_the_run_or_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = exporting(monkeypatch)
    data = treeify.data.digits()
    assert run("export", "run", "--trust", "--int8").exit_code == 0
    assert arguments["int8"].shape == (256, 3, 8, 8)
    images, labels = arguments["int8_held_out"]
    assert (len(images), len(labels)) == (360, 360)
    own = {bytes(image.numpy()): label for image, label in data.held_out}
    pairs = zip(images, labels.tolist(), strict=True)
    assert all(own[bytes(image.numpy())] == label for image, label in pairs)
    named = ("--calibrate", "name=digits", "--calibrate", "held_out=50", "--input-size", "16")
    result = run("export", "alone", "--trust", "--int8", *named)
    assert result.exit_code == 0, result.output
    assert arguments["int8"].shape == (256, 3, 16, 16)
    assert arguments["int8_held_out"][0].shape == (50, 3, 16, 16)
    unnamed = run("export", "alone", "--trust", "--int8")
    assert unnamed.exit_code == 2
    assert "--calibrate name=image_folder --calibrate root=DIRECTORY" in unnamed.stderr


BAD = {
    "batch": (["alone", "--batch", "0"], "--batch '0'", "dynamic"),
    "no sizes": (["alone", "--sizes", "1,x"], "no list of whole numbers", "1,4,16"),
    "sizes": (["alone", "--sizes", "1,4"], "4 leaves", "1, 3, 6"),
    "calibrate": (["alone", "--calibrate", "name=digits"], "without --int8", "both"),
    "export": (["exported/run"], "is an export already", "a run"),
    "nowhere": (["nowhere"], "holds no ensemble", "config.json"),
    "taken": (["alone", "--out", "run"], "run is not empty", "--overwrite"),
    "something else": (["alone", "--out", "run", "--overwrite"], "something else", "another"),
}


@pytest.mark.parametrize(("arguments", "problem", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message(
    arguments: list[str], problem: str, remedy: str, exported: Path
) -> None:
    before = sorted(map(str, Path().rglob("*")))
    result = run("export", *arguments, "--trust")
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert remedy in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.usefixtures("directories")
def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.deploy.directory.find_spec", lambda name: None)
    result = run("export", "alone", "--trust")
    assert result.exit_code == 2
    assert "pip install 'treeify[onnx]'" in result.stderr
    assert not Path("exported").exists()


@pytest.mark.usefixtures("directories")
def test_a_directory_without_a_run_gives_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = exporting(monkeypatch)
    Path("alone").rename("my net, the 2nd")
    assert run("export", "my net, the 2nd", "--trust").exit_code == 0
    assert arguments["name"] == "my_net_the_2nd"
    treeify.save(treeify.load("run/last", trust=True), "run/best")
    assert run("export", "run/best", "--trust").exit_code == 0
    assert arguments["name"] == "run"


def test_a_library_s_model_names_imagenet_s_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for classes, names in {
        "1000": ("tench, Tinca tinca", "goldfish, Carassius auratus"),
        "7": None,
    }.items():
        options = ("--splits", "1", "--num-classes", classes, "--out", classes, "--no-verify")
        assert run("convert", "test_resnet", *options).exit_code == 0
        result = run("export", classes, "--no-tune", "--no-verify", "--out", f"export{classes}")
        assert result.exit_code == 0, result.output
        found = Anytime(f"export{classes}", threads=1).classes
        assert (found and tuple(found[:2])) == names
    Image.new("RGB", (40, 40)).save("a.png")
    labels = [
        json.loads(run("predict", directory, "a.png", "--top", "1000", "--json").stdout)
        for directory in ("1000", "export1000")
    ]
    first, second = (str(each).count("goldfish, Carassius auratus") for each in labels)
    assert first == second > 0
