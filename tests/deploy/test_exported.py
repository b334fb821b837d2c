"""An export in the place of an ensemble: tensors in and out, and manifests that anybody wrote."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_exports
import torch
from tiny_exports import CLASSES, MACS, SHAPE, Tiny
from torch.testing import assert_close

from treeify.anytime.confidence import Budget
from treeify.deploy.exported import ExportedEnsemble, looks_exported
from treeify.errors import CheckpointError, InputError, LeafError, TreeifyError
from treeify.tree import Tree

MOST = 2**53


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_exports.write(tmp_path / "export")


def test_it_has_the_words_of_an_ensemble(tiny: Tiny) -> None:
    ensemble = ExportedEnsemble(tiny.path, threads=1)
    assert ensemble.tree == Tree((2, 2))
    assert (ensemble.sizes, ensemble.shape, ensemble.images) == ((1, 2, 4), SHAPE, None)
    assert [ensemble.count_macs(size) for size in ensemble.sizes] == list(MACS.values())
    assert ensemble.count_macs() == MACS[4]
    assert [ensemble.count_parameters(size) for size in ensemble.sizes] == [1, 2, 3]
    assert ensemble.preparation.size == SHAPE[1:]
    images = tiny.images(3)
    x = torch.from_numpy(images)
    expected = torch.from_numpy(tiny.leaf_logits(images))
    assert_close(ensemble.leaf_logits(x), expected)
    assert_close(ensemble.predict(x, leaves=2), expected[:, :2].mean(1))
    assert_close(ensemble.predict(x.double()), expected.mean(1))  # as `placed` converts floats
    with pytest.raises(LeafError, match="3"):
        ensemble.predict(x, leaves=3)
    with pytest.raises(InputError, match="does not fit"):
        ensemble.predict(x[:, :1])


def test_observers_get_tensors_and_positions(tiny: Tiny) -> None:
    ensemble = ExportedEnsemble(tiny.path, threads=1)
    images = tiny.images(8)
    x = torch.from_numpy(images)
    (budget,) = ensemble.budgets.values()
    assert isinstance(budget, Budget)
    seen: list[tuple[int, list[int]]] = []
    found = ensemble.predict(
        x,
        confidence=budget,
        observe=lambda answer, rows: seen.append((answer.leaves, rows.tolist())),
    )
    assert seen[0] == (1, list(range(8)))
    for leaves, rows in seen[1:]:
        assert rows == [row for row in range(8) if found.leaves[row] >= leaves]
    for row, leaves in enumerate(found.leaves.tolist()):
        assert_close(found.logits[row], torch.from_numpy(tiny.logits(images, leaves))[row])
    assert_close(ensemble.predict(x, confidence=budget.thresholds).leaves, found.leaves)


def test_a_fixed_number_of_images_is_filled_up(tmp_path: Path) -> None:
    export = tiny_exports.write(tmp_path / "export", batch=3)
    ensemble = ExportedEnsemble(export.path, threads=1)
    assert ensemble.images == 3
    assert len(ensemble.example_images(1)) == 3
    images = export.images(7)
    x, expected = torch.from_numpy(images), torch.from_numpy(export.leaf_logits(images))
    assert_close(ensemble.leaf_logits(x), expected)
    assert_close(ensemble.predict(x[:2]), expected[:2].mean(1))
    found = ensemble.predict(x[:1], confidence=0.0)
    assert found.leaves.tolist() == [1]
    with pytest.raises(InputError, match="does not fit"):
        ensemble.predict(x[:4])


def test_answers_that_are_no_logits_are_refused(tmp_path: Path) -> None:
    export = tiny_exports.write(tmp_path / "export", output="pair")
    with pytest.raises(InputError, match="no single tensor"):
        ExportedEnsemble(export.path, threads=1).leaf_logits(torch.from_numpy(export.images(2)))


def test_latencies_are_measured_where_they_are_not_known(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = ExportedEnsemble(tiny.path, threads=1)
    x = torch.from_numpy(tiny.images(2))
    note = ensemble.measure_if_unknown(x)
    assert note is not None
    assert f"kept in {tiny.path}" in note
    assert ExportedEnsemble(tiny.path, threads=1).measure_if_unknown(x) is None
    assert ensemble.predict(x, deadline=60.0).met

    def refuse(*arguments: object) -> None:
        raise OSError(30, "read-only")

    monkeypatch.setattr("treeify.deploy.runtime.os.replace", refuse)
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    latencies, kept = ensemble.calibrate(x[:1], repeats=10)
    assert kept.startswith("not kept: ")
    assert "\n" not in kept
    assert latencies.repeats == 10


def test_threads_are_those_of_the_environment(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ExportedEnsemble(tiny.path).model.threads is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ExportedEnsemble(tiny.path).model.threads == torch.get_num_threads()


def test_an_ensemble_that_has_a_file_of_this_name_stays_one(tiny: Tiny) -> None:
    assert looks_exported(tiny.path)
    (tiny.path / "config.json").write_text("{}")
    assert not looks_exported(tiny.path)
    assert not looks_exported(tiny.path / "ensemble.json")


OUT_OF_BOUNDS = {
    "images": {"images": {"shape": ["batch", 3, 2**15, 2**15], "dtype": "float32"}},
    "batch": {"images": {"shape": [2**30, *SHAPE], "dtype": "float32"}},
    "tree": {"tree": {"fanouts": [3, 5]}},
    "no tree": {"tree": None},
    "budgets": {"budgets": [{"target_macs": 1, "sizes": [1, 2, 4], "thresholds": [0.1, 0.2]}]},
    "another version": {"version": 2},
}


@pytest.mark.parametrize("changes", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_what_is_out_of_bounds_is_damaged(changes: dict[str, Any], tiny: Tiny) -> None:
    tiny.rewrite(**changes)
    with pytest.raises(CheckpointError, match=r"ensemble\.json"):
        ExportedEnsemble(tiny.path, threads=1)


def changed(value: Any) -> Iterator[Any]:
    """A manifest with any one of its values gone, or of another type or size."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {name: own for name, own in value.items() if name != key}
            yield from ({**value, key: other} for other in changed(part))
    elif isinstance(value, list) and value:
        yield value[1:]
        yield from ([other, *value[1:]] for other in changed(value[0]))
    yield from (None, -1, MOST, 0.5, "x", [], {}, [[]], True)


def test_no_manifest_is_a_bug(tiny: Tiny) -> None:
    whole = tiny.manifest()
    x = torch.from_numpy(tiny.images(1))
    for manifest in changed(copy.deepcopy(whole)):
        (tiny.path / "ensemble.json").write_text(json.dumps(manifest))
        try:
            ensemble = ExportedEnsemble(tiny.path, threads=1)
            ensemble.preparation.check()
            assert ensemble.leaf_logits(x).shape[-1] == CLASSES
        except TreeifyError as error:
            assert str(error)
