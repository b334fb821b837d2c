"""What the runtime refuses, each in one message that says what to do."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_exports
from tiny_exports import Tiny

from treeify.deploy import runtime
from treeify.deploy.runtime import Anytime, AnytimeError, EngineError, ExportError, InputError
from treeify.deploy.runtime import LeafError as SizeError


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_exports.write(tmp_path / "tiny")


@pytest.fixture
def model(tiny: Tiny) -> Anytime:
    return Anytime(tiny.path, threads=1)


IMAGES = np.zeros((2, 3, 4, 4), np.float32)


def test_no_export(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"is no exported ensemble.\n.*ensemble.json\n.*no such f"
    ):
        Anytime(tmp_path)
    with pytest.raises(InputError, match="directory is no value it may have"):
        Anytime(None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="no such directory"):
        Anytime("nul\0")
    with pytest.raises(ExportError, match="no such directory"):
        Anytime(tmp_path / "nowhere")
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(ExportError, match="of no exported ensemble: format is None"):
        Anytime(tmp_path)


def test_another_version(tiny: Tiny) -> None:
    tiny.rewrite(version=2)
    with pytest.raises(ExportError, match=r"another version.\n.*version 1.*\n.*version 2\n.*anyt"):
        Anytime(tiny.path)


@pytest.mark.parametrize("name", ["step-01.onnx", "step-03.onnx"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "directory", "pipe"])
def test_files_that_are_not_there(tiny: Tiny, name: str, damage: str) -> None:
    file = tiny.path / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.touch()
    elif damage == "directory":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)
    with pytest.raises(ExportError, match=rf"{name} is missing, truncated or exchanged"):
        Anytime(tiny.path)


@pytest.mark.parametrize("preload", ["none", "next", "all"])
def test_an_exchanged_file_is_named_when_it_is_needed(tiny: Tiny, preload: str) -> None:
    file = tiny.path / "step-03.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    model = Anytime(tiny.path, threads=1, preload=preload)
    session = model.session(IMAGES)
    before = session.advance(to=2).logits
    for _ in range(2):
        with pytest.raises(ExportError, match=r"step-03.onnx is .*exchanged.\n.*SHA-256"):
            session.advance()
    assert session.leaves == 2
    assert np.array_equal(session.logits, before)


def test_an_exchanged_file_that_nobody_verifies(tiny: Tiny) -> None:
    (tiny.path / "step-01.onnx").write_bytes(b"no graph at all")
    with pytest.raises(ExportError, match=r"step-01.onnx cannot be opened by onnxruntime"):
        Anytime(tiny.path, verify=False)
    (tiny.path / "step-01.onnx").write_bytes((tiny.path / "step-02.onnx").read_bytes())
    with pytest.raises(ExportError, match=r"is not the step that.*\n.*images.*\n.*kept_first"):
        Anytime(tiny.path, verify=False)


def test_links_out_of_the_directory(tiny: Tiny, tmp_path: Path) -> None:
    file = tiny.path / "step-02.onnx"
    file.rename(tmp_path / "elsewhere.onnx")
    file.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ExportError, match=r"a link that leads to .*elsewhere"):
        Anytime(tiny.path)
    with pytest.raises(ExportError, match=r"a link that leads to .*elsewhere"):
        Anytime(tiny.path, verify=False)


def test_links_to_and_within_the_directory(tiny: Tiny, tmp_path: Path) -> None:
    file = tiny.path / "step-02.onnx"
    file.rename(tiny.path / "other.onnx")
    file.symlink_to("other.onnx")
    (tmp_path / "link").symlink_to(tiny.path)
    assert Anytime(tmp_path / "link").predict(IMAGES).shape == (2, 5)


HOSTILE: list[tuple[str, Any]] = [
    ("steps.1.file", "../secret"),
    ("steps.1.file", "/etc/passwd"),
    ("steps.1.file", "a/b"),
    ("steps.1.file", ".."),
    ("steps.1.file", "step\0"),
    ("steps.1.file", "step-02.onnx\n"),
    ("steps.1.file", "C:step"),
    ("steps.1.file", None),
    ("steps.1.sha256", "00"),
    ("steps.1.sha256", 7),
    ("steps.1.bytes", -1),
    ("steps.1.bytes", 2**80),
    ("steps.1.bytes", True),
    ("steps.1.start", 0),
    ("steps.1.start", 1.0),
    ("steps.1.leaves", 1),
    ("steps.1.leaves", 3),
    ("steps.1.inputs", [{"name": "kept_nowhere"}]),
    ("steps.1.inputs", ["images"]),
    ("steps.1.inputs", "images"),
    ("steps.1.outputs", []),
    ("steps.1.outputs", [{"name": "logits", "kind": "tea leaves"}]),
    ("steps.0.outputs.1.batch_dim", 2),
    ("steps.0.outputs.1.batch_dim", -1),
    ("steps.0.outputs.1.name", "images"),
    ("steps.0.outputs.1.name", "kept_first"),
    ("steps.0.outputs.1.shape", [-3]),
    ("steps.0.data", {"file": "../x", "sha256": 64 * "0", "bytes": 1}),
    ("steps", []),
    ("steps", {}),
    ("steps", [7]),
    ("sizes", [1, 2]),
    ("sizes", [1, 2, 4, 8]),
    ("sizes", 3),
    ("macs", {}),
    ("macs", None),
    ("macs.2", "many"),
    ("images.shape", []),
    ("images.shape", ["batch", "batch", 4]),
    ("images.shape", ["batch", 0]),
    ("images.shape", ["batch", "tall", 4]),
    ("images.dtype", "object"),
    ("output", {}),
    ("output", {"tensor": "nothing"}),
    ("output", {"tuple": {"tensor": "logits"}}),
    ("output", {"dict": [1]}),
    ("output", {"tensor": "logits", "constant": 3}),
    ("output", {"tensor": ["logits"]}),
    ("droppable", "yes"),
    ("name", None),
    ("classes", "abc"),
    ("classes", [1]),
    ("budgets", None),
    ("budgets.0.thresholds", [0.1]),
    ("budgets.0.thresholds", [0.1, math.nan]),
    ("budgets.0.target_macs", 1e400),
    ("preparation", 3),
    ("preparation.size", [4]),
    ("preparation.size", [4, 10**6]),
    ("preparation.std", [0, 1, 1]),
    ("preparation.mean", [0.5]),
    ("preparation.mean", []),
    ("preparation.channels", 2**50),
    ("preparation.crop_mode", "none"),
    ("preparation.crop_pct", 0),
    ("preparation.interpolation", ["bilinear"]),
    ("version", 0),
    ("version", "1"),
    ("format", "treeify"),
]


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_damaged_manifest(tiny: Tiny, place: str, value: Any) -> None:
    manifest = tiny.manifest()
    inner: Any = manifest
    *keys, last = place.split(".")
    for key in keys:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[last] = value
    (tiny.path / "ensemble.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"ensemble.json is damaged, or .*: ."):
        Anytime(tiny.path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\ud800", 10**5 * "[", '{"format": ' + 5000 * "9" + "}"],
    ids=["empty", "cut", "list", "null", "no-text", "deep", "long-number"],
)
def test_a_manifest_that_is_none(tiny: Tiny, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    (tiny.path / "ensemble.json").write_bytes(content)
    with pytest.raises(ExportError, match="damaged, or of no exported ensemble"):
        Anytime(tiny.path)


def test_messages_hold_nothing_that_a_terminal_obeys(tiny: Tiny) -> None:
    tiny.rewrite(format="\x1b[2J")
    with pytest.raises(ExportError) as caught:
        Anytime(tiny.path)
    assert "\x1b" not in str(caught.value)


def test_keys_that_may_be_missing(tiny: Tiny) -> None:
    manifest = tiny.manifest()
    for key in ("classes", "preparation", "quantised", "versions"):
        del manifest[key]
    del manifest["steps"][0]["outputs"][1]["batch_dim"]
    (tiny.path / "ensemble.json").write_text(json.dumps(manifest))
    assert Anytime(tiny.path).predict(IMAGES).shape == (2, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            IMAGES[0],
            r"does not fit the model.*\[N, 3, 4, 4\], float32\n.*\(3, 4, 4\).*\n.*images\[",
        ),
        (IMAGES[:, :1], r"does not fit the model.*\n.*shape \(2, 1, 4, 4\), float32$"),
        (IMAGES[:, :, :2], r"does not fit the model"),
        (IMAGES[0, 0], r"does not fit the model"),
        (np.float32(3), "a numpy array"),
        (IMAGES.astype(np.uint8), r"dtype .*\n.*float32\n.*uint8\n.*/ 255, normalised"),
        (IMAGES.astype(np.float64), r"dtype .*\n.*float32\n.*float64\n.*astype\('float32'\)\.$"),
        (IMAGES.astype(">f4"), "dtype"),
        (IMAGES[:0], r"there are no images.\n.*\n  Found shape \(0, 3, 4, 4\)"),
        (IMAGES.tolist(), "a numpy array"),
        (None, "a numpy array"),
    ],
    ids=str,
)
def test_images_that_do_not_fit(model: Anytime, images: Any, message: str) -> None:
    for call in (model.predict, model.session, lambda x: next(model.anytime(x)), model.calibrate):
        with pytest.raises(InputError, match=f"(?s){message}"):
            call(images)


def test_a_batch_of_another_size(tmp_path: Path) -> None:
    tiny = tiny_exports.write(tmp_path / "fixed", batch=2)
    model = Anytime(tiny.path, threads=1)
    with pytest.raises(InputError, match=r"shape \[2, 3, 4, 4\].*\n.*shape \(3, 3, 4, 4\)"):
        model.predict(tiny.images(3))
    with pytest.raises(InputError, match="images cannot leave this session's batch"):
        model.session(IMAGES).select([0])


def test_a_tensor_is_no_array(model: Anytime) -> None:
    import torch

    with pytest.raises(InputError, match=r"Found a Tensor of shape \(2, 3, 4, 4\)[\s\S]*numpy\(\)"):
        model.predict(torch.zeros(2, 3, 4, 4))  # type: ignore[arg-type]


def test_values_that_are_no_numbers_are_images(model: Anytime) -> None:
    assert np.isnan(model.predict(np.full_like(IMAGES, np.nan))).all()


@pytest.mark.parametrize("leaves", [3])
def test_sizes_where_no_step_ends(model: Anytime, leaves: int) -> None:
    message = r"no step ends at 3 leaves.\n.*one of \(1, 2, 4\)\n.*--sizes"
    for call in (
        lambda: model.predict(IMAGES, leaves=leaves),
        lambda: list(model.anytime(IMAGES, sizes=[1, leaves])),
        lambda: model.session(IMAGES).advance(to=leaves),
    ):
        with pytest.raises(SizeError, match=message):
            call()


@pytest.mark.parametrize("leaves", [0, -1, 5, 2.0, True, "2", 10**100, IMAGES])
def test_sizes_that_are_none(model: Anytime, leaves: Any) -> None:
    with pytest.raises(SizeError, match=r"leaves were asked for.\n.*one of \(1, 2, 4\)"):
        model.predict(IMAGES, leaves=leaves)


def test_sizes_that_do_not_increase(model: Anytime) -> None:
    with pytest.raises(SizeError, match="2 leaves are asked for twice"):
        list(model.anytime(IMAGES, sizes=[2, 2]))
    with pytest.raises(SizeError, match=r"2 leaves are computed already, 1 were.*\n.*\(2, 4\)"):
        list(model.anytime(IMAGES, sizes=[2, 1]))
    with pytest.raises(SizeError, match="None leaves were asked for"):
        list(model.anytime(IMAGES, sizes=[None]))  # type: ignore[list-item]


def test_a_session_that_is_done_or_has_not_begun(model: Anytime) -> None:
    session = model.session(IMAGES)
    with pytest.raises(SizeError, match="no leaf is computed yet"):
        _ = session.logits
    session.advance(to=4)
    with pytest.raises(SizeError, match="all 4 leaves are computed"):
        session.advance()


@pytest.mark.parametrize(
    "images", [[2], [-1], [0.5], [[0]], [True], np.ones(3, bool), "all", None, [[1], [1, 2]], 1]
)
def test_images_that_are_not_in_the_batch(model: Anytime, images: Any) -> None:
    session = model.session(IMAGES)
    with pytest.raises(InputError, match=r"no images of this.*\n.*positions from 0 to 1, \[M\]"):
        session.select(images)
    assert len(session.advance().logits) == 2


def test_a_session_that_all_images_have_left(model: Anytime) -> None:
    session = model.session(IMAGES)
    session.advance()
    session.select([])
    session.select([])
    assert session.logits.shape == (0, 5)
    with pytest.raises(InputError, match="there are no images"):
        session.advance()


def test_images_that_cannot_leave(tmp_path: Path) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny2", droppable=False)
    with pytest.raises(InputError, match="images cannot leave this session's batch"):
        Anytime(tiny.path).session(IMAGES).select([0])


@pytest.mark.parametrize("deadline", [0, 0.0, -1, math.nan, "soon", True, 1j])
def test_deadlines_that_are_none(model: Anytime, deadline: Any) -> None:
    with pytest.raises(InputError, match=r"^deadline=.* has passed before it began, or is none"):
        model.predict(IMAGES, deadline=deadline)


@pytest.mark.parametrize("confidence", [math.nan, -0.1, True, "0.9", [0.5], [0.5, None], [1, 2, 3]])
def test_confidences_that_are_none(model: Anytime, confidence: Any) -> None:
    with pytest.raises(InputError, match=r"^confidence=.* fits no ensemble of 4 leaves"):
        model.predict(IMAGES, confidence=confidence)


@pytest.mark.parametrize("budget", [151, 0, -1, math.nan, math.inf, True, "60M", [1]])
def test_budgets_that_were_not_calibrated(model: Anytime, budget: Any) -> None:
    with pytest.raises(
        InputError, match=r"no thresholds are saved for a budget of .*\n.*one of 150"
    ):
        model.predict(IMAGES, budget=budget)


def test_budgets_of_other_sizes_or_none(tiny: Tiny) -> None:
    budget = tiny_exports.BUDGET | {"sizes": [1, 4], "thresholds": [0.5]}
    tiny.rewrite(budgets=[budget])
    with pytest.raises(InputError, match="the budget was made for another tree"):
        Anytime(tiny.path).predict(IMAGES, budget=150)
    tiny.rewrite(budgets=[])
    with pytest.raises(InputError, match="none, no budget has been calibrated"):
        Anytime(tiny.path).predict(IMAGES, budget=150)


def test_confidence_of_what_is_no_logits(tmp_path: Path) -> None:
    tiny = tiny_exports.write(tmp_path / "pair", output="pair")
    with pytest.raises(InputError, match=r"needs one array of logits[\s\S]*tuple"):
        Anytime(tiny.path).predict(IMAGES, confidence=0.5)


@pytest.mark.parametrize(
    "limits",
    [{"leaves": 2, "deadline": 1.0}, {"confidence": 0.5, "budget": 150}],
    ids=str,
)
def test_several_limits(model: Anytime, limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="several limits were given"):
        model.predict(IMAGES, **limits)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threads": 0}, "threads is no value"),
        ({"threads": 1.0}, "threads is no value"),
        ({"threads": True}, "threads is no value"),
        ({"preload": "some"}, "preload is no value"),
        ({"engine": "steam"}, "there is no such engine.\n  Expected one of onnxruntime, openvino"),
    ],
    ids=str,
)
def test_options_that_are_none(tiny: Tiny, options: dict[str, Any], error: str) -> None:
    with pytest.raises(AnytimeError, match=error):
        Anytime(tiny.path, **options)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_that_is_not_installed(
    tiny: Tiny, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(EngineError, match=rf"{engine} is not installed[\s\S]*pip install {engine}"):
        Anytime(tiny.path, engine=engine)


def test_a_step_that_fails(model: Anytime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("out of memory\nmore of it")

    session = model.session(IMAGES)
    monkeypatch.setattr(model._graph(0), "_run", fail)
    message = r"step-01.onnx cannot compute with these 2 images.\n  Found out of memory\n"
    with pytest.raises(InputError, match=message):
        session.advance()
    assert session.leaves == 0


def test_every_error_has_one_base() -> None:
    for error in (ExportError, EngineError, InputError, SizeError):
        assert issubclass(error, AnytimeError)
        assert issubclass(error, ValueError)
    assert runtime.__doc__ is not None
