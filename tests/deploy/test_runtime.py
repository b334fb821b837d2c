"""The runtime's answers are those of the leaves that an export holds."""

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_exports
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiny_exports import MACS, SIZES, Tiny

from treeify.anytime.session import mean_over_leaves
from treeify.deploy import runtime
from treeify.deploy.runtime import Answer, Anytime, Prediction, _mean

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_exports.write(tmp_path / "tiny")


@pytest.fixture
def model(tiny: Tiny) -> Anytime:
    return Anytime(tiny.path, threads=1)


def test_what_an_export_says(model: Anytime, tiny: Tiny) -> None:
    assert model.name == "tiny"
    assert (model.leaves, model.sizes, model.macs) == (4, SIZES, MACS)
    assert model.classes == list("abcde")
    assert model.shape == ("batch", 3, 4, 4)
    assert model.manifest == tiny.manifest()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_size_is_the_mean_of_its_leaves(model: Anytime, tiny: Tiny, batch: int) -> None:
    images = tiny.images(batch)
    answers = list(model.anytime(images))
    assert [answer.leaves for answer in answers] == list(SIZES)
    assert [answer.macs for answer in answers] == list(MACS.values())
    for answer in answers:
        assert_allclose(answer.logits, tiny.logits(images, answer.leaves), **TOLERANCE)
        assert_array_equal(model.predict(images, leaves=answer.leaves), answer.logits)
    assert_array_equal(model.predict(images), answers[-1].logits)
    times = [answer.elapsed for answer in answers]
    assert 0 < times[0] < times[1] < times[2]


def test_sizes_that_are_asked_for(model: Anytime, tiny: Tiny) -> None:
    images = tiny.images(2)
    answers = list(model.anytime(images, sizes=[2, 4]))
    assert [answer.leaves for answer in answers] == [2, 4]
    assert_allclose(answers[0].logits, tiny.logits(images, 2), **TOLERANCE)


def test_a_session_is_advanced_bit_by_bit(model: Anytime, tiny: Tiny) -> None:
    images = tiny.images(3)
    session = model.session(images)
    assert (session.leaves, session.macs, session.done, session.cached_bytes) == (0, 0, False, 0)
    answer = session.advance()
    assert isinstance(answer, Answer)
    assert (session.leaves, session.macs) == (1, 100)
    assert session.cached_bytes == 3 * (8 + 6) * 4
    assert session.advance(to=1).leaves == 1  # nothing is computed
    session.advance(to=4)
    assert session.done
    assert session.cached_bytes == 0
    assert session.macs == 250
    assert session.elapsed >= answer.elapsed
    assert_allclose(session.leaf_logits, tiny.leaf_logits(images), **TOLERANCE)
    assert_allclose(session.logits, tiny.logits(images), **TOLERANCE)


def test_kept_values_are_freed_with_their_last_reader(model: Anytime, tiny: Tiny) -> None:
    session = model.session(tiny.images(3))
    session.advance(to=2)
    assert session.cached_bytes == 3 * 8 * 4


def test_kept_values_are_not_copied_between_steps(
    model: Anytime, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session(tiny.images(3))
    session.advance()
    seen: dict[str, Any] = {}
    graph = model._graph(1)
    monkeypatch.setattr(
        graph, "_run", lambda outputs, arrays: seen.update(arrays) or [np.zeros((3, 1, 5))]
    )
    kept = session._values["kept_first"]
    session.advance()
    assert seen["kept_first"] is kept


def test_images_of_other_strides_are_arranged(model: Anytime, tiny: Tiny) -> None:
    images = tiny.images(4)
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert_array_equal(model.predict(channels_last), model.predict(images))
    assert_array_equal(model.predict(images[::2]), model.predict(images[::2].copy()))


@pytest.mark.parametrize("by_window", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_images_leave_the_batch(tmp_path: Path, by_window: bool, after: int) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny", by_window=by_window)
    images = tiny.images(5)
    session = Anytime(tiny.path, threads=1).session(images)
    for _ in range(after):
        session.advance()
    session.keep(np.array([True, False, True, True, False]))
    session.select([2, 0])
    session.advance(to=4)
    assert_allclose(session.leaf_logits, tiny.leaf_logits(images[[3, 0]]), **TOLERANCE)


@pytest.mark.parametrize("confidence", [0.0, 0.4, [0.45, 0.5], 1.1, np.float32(0.4)])
@pytest.mark.parametrize("droppable", [True, False])
def test_confident_images_stop(tmp_path: Path, confidence: Any, droppable: bool) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny", droppable=droppable)
    images = 3 * tiny.images(20)
    prediction = Anytime(tiny.path, threads=1).predict(images, confidence=confidence)
    assert isinstance(prediction, Prediction)
    assert prediction.met is None
    thresholds = confidence if isinstance(confidence, list) else [confidence] * 2
    for index, leaves in enumerate(prediction.leaves):
        expected = 4
        for size, threshold in zip(SIZES[1::-1], thresholds[::-1], strict=True):
            exponents = np.exp(tiny.logits(images[index : index + 1], size)[0])
            if (exponents / exponents.sum()).max() >= threshold:
                expected = size
        assert leaves == expected
        own = tiny.logits(images[index : index + 1], leaves)[0]
        assert_allclose(prediction.logits[index], own, **TOLERANCE)


def test_a_budget_is_spent_by_its_thresholds(model: Anytime, tiny: Tiny) -> None:
    images = 3 * tiny.images(20)
    by_budget = model.predict(images, budget=150.0)
    by_hand = model.predict(images, confidence=[0.4, 0.6])
    assert_array_equal(by_budget.leaves, by_hand.leaves)
    assert_array_equal(by_budget.logits, by_hand.logits)
    assert len(set(by_budget.leaves.tolist())) > 1


@pytest.mark.parametrize("droppable", [True, False])
def test_answers_are_observed(tmp_path: Path, droppable: bool) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny", droppable=droppable)
    model, images = Anytime(tiny.path, threads=1), 3 * tiny.images(20)
    seen: list[tuple[int, list[int]]] = []

    def observe(answer: Answer, positions: Any) -> None:
        assert len(answer.logits) == len(positions)
        seen.append((answer.leaves, positions.tolist()))

    model.predict(images, leaves=2, observe=observe)
    assert seen == [(1, list(range(20))), (2, list(range(20)))]
    seen.clear()
    prediction = model.predict(images, confidence=0.5, observe=observe)
    for leaves, positions in seen:
        there = np.flatnonzero(prediction.leaves >= leaves) if droppable else np.arange(20)
        assert positions == there.tolist()


def test_outputs_keep_their_structure(tmp_path: Path) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny", output="pair")
    images = tiny.images(6)
    logits, classes, nothing = Anytime(tiny.path, threads=1).predict(images)
    assert nothing is None
    assert_allclose(logits, tiny.logits(images), **TOLERANCE)
    votes = tiny.leaf_logits(images).argmax(-1)
    for mine, row in zip(classes["classes"], votes, strict=True):
        assert mine == np.bincount(row).argmax()


def test_means_are_those_of_pytorch() -> None:
    generator = np.random.default_rng(0)
    for shape in ((3, 4, 5), (3, 4), (4,)):
        for dtype in (np.float32, np.float64, np.float16, np.int64, bool):
            leaf_logits = generator.integers(0, 3, shape).astype(dtype)
            expected = mean_over_leaves(torch.from_numpy(leaf_logits)).numpy()
            assert _mean(leaf_logits).dtype == expected.dtype
            assert_allclose(_mean(leaf_logits), expected, rtol=1e-6)


def test_threads_share_a_model(model: Anytime, tiny: Tiny) -> None:
    images = [tiny.images(2, seed) for seed in range(8)]
    expected = [model.predict(batch) for batch in images]
    model = Anytime(tiny.path, threads=1, preload="none")  # its files are opened by all at once
    problems: list[object] = []

    def work(index: int) -> None:
        answers = [model.predict(images[index]) for _ in range(50)]
        problems.extend(answer for answer in answers if not np.array_equal(answer, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def _wait_for_openers() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("anytime"):
            thread.join()


@pytest.mark.parametrize(
    ("preload", "at_once", "after_one"),
    [("none", [1, 0, 0], [1, 0, 0]), ("next", [1, 1, 0], [1, 1, 0]), ("all", [1, 1, 1], [1, 1, 1])],
)
def test_files_are_opened_when_asked(
    tiny: Tiny, preload: str, at_once: list[int], after_one: list[int]
) -> None:
    model = Anytime(tiny.path, threads=1, preload=preload)
    _wait_for_openers()
    assert [graph is not None for graph in model._graphs] == at_once
    session = model.session(tiny.images(1))
    session.advance()
    _wait_for_openers()
    assert [graph is not None for graph in model._graphs] == after_one
    session.advance()
    _wait_for_openers()
    assert [graph is not None for graph in model._graphs] == [1, 1, preload != "none"]
    session.advance()
    assert None not in model._graphs


@pytest.mark.parametrize("spinning", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_options_change_no_answer(tiny: Tiny, spinning: bool, verify: bool) -> None:
    images = tiny.images(2)
    model = Anytime(str(tiny.path), spinning=spinning, verify=verify)
    assert_allclose(model.predict(images), tiny.logits(images), **TOLERANCE)


def test_a_batch_of_one_size(tmp_path: Path) -> None:
    tiny = tiny_exports.write(tmp_path / "tiny", batch=2)
    model, images = Anytime(tiny.path, threads=1), tiny.images(2)
    assert not model.droppable
    assert_allclose(model.predict(images), tiny.logits(images), **TOLERANCE)


def test_weights_in_a_file_of_their_own(tiny: Tiny) -> None:
    images, expected = tiny.images(2), Anytime(tiny.path).predict(tiny.images(2))
    file, data = tiny.path / "step-01.onnx", tiny.path / "step-01.onnx.data"
    step = onnx.load(file)
    onnx.save(step, file, save_as_external_data=True, location=data.name, size_threshold=100)
    manifest = tiny.manifest()
    entries = [
        {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in (file, data)
    ]
    manifest["steps"][0] |= entries[0] | {"data": entries[1]}
    tiny.rewrite(steps=manifest["steps"])
    assert_allclose(Anytime(tiny.path).predict(images), expected, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"by_window": True}, {"output": "pair"}], ids=str)
def test_openvino_reads_the_same_files(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("openvino")
    tiny = tiny_exports.write(tmp_path / "tiny", **options)
    model, images = Anytime(tiny.path, threads=1, engine="openvino"), tiny.images(3)
    session = model.session(images)
    before = session.advance().logits
    kept = [value.copy() for value in session._values.values()]
    model.predict(tiny.images(2, seed=1))  # whose values are others
    for value, copy in zip(session._values.values(), kept, strict=True):
        assert_array_equal(value, copy)
    session.keep([2, 0])
    session.advance(to=4)
    if "output" in options:
        before, logits = before[0], session.leaf_logits[0]
    else:
        logits = session.leaf_logits
    assert_allclose(before, tiny.logits(images, 1), **TOLERANCE)
    assert_allclose(logits, tiny.leaf_logits(images[[2, 0]]), **TOLERANCE)


def test_steps_are_found_from_another_directory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.path.parent)
    model = Anytime(tiny.path.name, threads=1, preload="none")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    images = tiny.images(2)
    assert_allclose(model.predict(images), tiny.logits(images), **TOLERANCE)


@pytest.mark.parametrize("preload", ["none", "all"])
def test_a_step_that_vanishes_while_it_is_opened(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, preload: str
) -> None:
    check = runtime._check_file

    def check_then_lose(*arguments: Any, **options: Any) -> Path:
        path = check(*arguments, **options)
        if opened:
            path.unlink()
        return path

    opened: list[Anytime] = []
    monkeypatch.setattr(runtime, "_check_file", check_then_lose)
    model = Anytime(tiny.path, threads=1, preload="none")
    opened.append(model)
    if preload == "all":
        model._open_ahead([1])
    with pytest.raises(runtime.ExportError, match="missing, truncated or exchanged"):
        model.predict(tiny.images(1))
