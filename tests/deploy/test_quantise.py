"""Exports in 8 bits: near their float ones, smaller, and alike from outside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn

import treeify
from treeify.deploy import export
from treeify.deploy.exporter import Exported
from treeify.deploy.runtime import Anytime
from treeify.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from treeify.deploy import quantisation_report, quantised_graph  # noqa: E402 - needs the packages above

FLOAT, INT8 = 1, 3  # of ONNX
SIZES = (1, 3, 6)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hne() -> treeify.HierarchicalEnsemble:
    return small.ensemble()


@pytest.fixture(scope="module")
def before(hne: treeify.HierarchicalEnsemble, tmp_path_factory: Any) -> Exported:
    return export(hne, tmp_path_factory.mktemp("float") / "net", tune=False, verify=False)


@pytest.fixture(scope="module")
def after(hne: treeify.HierarchicalEnsemble, tmp_path_factory: Any) -> Exported:
    out = tmp_path_factory.mktemp("int8") / "net"
    labels = torch.arange(40) % small.CLASSES
    return export(hne, out, tune=False, int8=images(40), int8_labels=labels)


def graphs(exported: Exported) -> list[Any]:
    return [onnx.load(exported.path / row["file"]).graph for row in exported.manifest["steps"]]


def weights(graph: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in graph.initializer}


def float_products(graph: Any) -> list[Any]:
    """The products that read weights in float."""
    constants = weights(graph)
    return [
        node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and any(name in constants and constants[name].data_type == FLOAT for name in node.input)
    ]


def test_answers_are_close_at_every_size(before: Exported, after: Exported) -> None:
    x = images(5, seed=1).numpy()
    exact, coarse = (Anytime(each.path, threads=1).session(x) for each in (before, after))
    for size in SIZES:
        expected, actual = exact.advance(to=size).logits, coarse.advance(to=size).logits
        largest = np.abs(expected).max()
        assert np.abs(actual - expected).max() < 0.05 * largest
    assert not np.array_equal(expected, actual)


def test_seen_from_outside_steps_are_as_before(before: Exported, after: Exported) -> None:
    for one, other in zip(graphs(before), graphs(after), strict=True):
        for side in ("input", "output"):
            values = [{v.name: v.type for v in getattr(graph, side)} for graph in (one, other)]
            assert values[0] == values[1]
    rows = zip(before.manifest["steps"], after.manifest["steps"], strict=True)
    changed = ("sha256", "bytes", "parity")
    for one, other in rows:
        assert {k: v for k, v in one.items() if k not in changed} == {
            k: v for k, v in other.items() if k not in changed
        }


def test_kept_values_stay_float(after: Exported) -> None:
    kept = {
        output["name"]
        for row in after.manifest["steps"]
        for output in row["outputs"]
        if output["kind"] == "kept"
    }
    assert kept
    types = {v.name: v.type.tensor_type.elem_type for g in graphs(after) for v in g.output}
    assert all(types[name] == FLOAT for name in kept)


def test_the_head_alone_stays_float(after: Exported) -> None:
    for graph in graphs(after):
        assert len(float_products(graph)) == 1
        assert float_products(graph)[0].op_type in ("Gemm", "MatMul")


def test_weights_have_a_scale_for_each_channel(after: Exported) -> None:
    (first, *_) = graphs(after)
    constants = weights(first)
    convolved = {
        node.input[0]: constants[node.input[1]].dims
        for node in first.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    scales = [d for name, d in convolved.items() if constants[name].data_type == INT8]
    assert len(scales) == 3
    assert all(list(dims) == [8] for dims in scales)


def test_files_hold_nothing_but_standard_operations(after: Exported) -> None:
    for row in after.manifest["steps"]:
        model = onnx.load(after.path / row["file"])
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]


def test_the_manifest_says_what_was_done(after: Exported) -> None:
    said = json.loads((after.path / "ensemble.json").read_text())
    assert said == after.manifest
    assert said["quantised"]["calibrated_on"] == {"images": 40}
    assert said["quantised"]["scheme"].startswith("QDQ U8S8 per channel")
    assert said["quantised"]["reduced_range"] is not quantised_graph.has_vnni()
    assert all(0 < row["parity"]["largest_difference"] < 0.05 for row in said["steps"])
    assert "8 bits" in (after.path / "README.md").read_text()
    names = {path.name for path in after.path.iterdir()}
    files = {row["file"] for row in said["steps"]}
    assert names == files | {"ensemble.json", "README.md", "anytime.py"}


def test_the_report_compares_both_at_every_size(before: Exported, after: Exported) -> None:
    report = after.quantisation
    assert report is not None
    assert [row.leaves for row in report.rows] == list(SIZES)
    model = Anytime(before.path, threads=1)
    labels = np.arange(40) % small.CLASSES
    for row in report.rows:
        right = model.predict(images(40).numpy(), leaves=row.leaves).argmax(1) == labels
        assert row.float32.accuracy == pytest.approx(right.mean())
        assert row.int8.accuracy is not None
        assert 0.8 <= row.agreement <= 1
        assert row.int8.seconds > 0
    assert report.rows[-1].int8.bytes == sum(row["bytes"] for row in after.manifest["steps"])
    assert "accuracy %" in str(after)
    assert report.verdict in str(report)
    assert before.quantisation is None


def test_without_vnni_the_report_promises_no_speed(after: Exported) -> None:
    from dataclasses import replace

    report = after.quantisation
    assert report is not None
    assert ", not faster" in replace(report, vnni=False).verdict


class Wide(nn.Sequential):
    """Large enough for weights to outweigh names."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()),
            nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 5)),
        )


@pytest.fixture(scope="module")
def wide() -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    return treeify.hierarchicalize(Wide(), ["1", "2"], init="fresh", example_input=images(2)).eval()


def test_sizes_shrink_with_any_data(wide: treeify.HierarchicalEnsemble, tmp_path: Path) -> None:
    held_out = (images(6, seed=2), [0, 1, 2, 3, 4, 0])
    batches = (images(3, seed=seed) for seed in range(4))
    out = export(
        wide, tmp_path / "w", tune=False, verify=False, int8=batches, int8_held_out=held_out
    )
    assert out.quantisation is not None
    assert out.quantisation.images == 6
    assert out.quantisation.held_out
    first = out.quantisation.rows[0]
    heads = 4 * 64 * 16 * 5
    assert first.int8.bytes - heads < 0.4 * (first.float32.bytes - heads)
    assert all(row["parity"] is None for row in out.manifest["steps"])


def test_a_fixed_batch_is_filled_up(hne: treeify.HierarchicalEnsemble, tmp_path: Path) -> None:
    out = export(hne, tmp_path / "net", batch=4, tune=False, sizes=[1], int8=images(6))
    assert out.quantisation is not None
    assert out.quantisation.batch == 4
    assert out.quantisation.rows[0].int8.accuracy is None
    assert Anytime(out.path, threads=1).predict(images(4).numpy()).shape == (4, small.CLASSES)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [[0, 0, 0, 0]]), (6, [[0, 1, 2, 3], [4, 5, 4, 5]])]
)
def test_batches_repeat_images_to_be_full(count: int, expected: list[list[int]]) -> None:
    made = list(quantisation_report.batches(np.arange(count), 4))
    assert [batch.tolist() for _, batch in made] == expected
    assert np.concatenate([rows for rows, _ in made]).tolist() == list(range(count))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 3, 8, 8), "has no images"),
        ([], "has no images"),
        (torch.zeros(2, 3, 9, 8), "does not fit"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "does not fit"),
        (torch.full((2, 3, 8, 8), torch.nan), "NaN"),
        (["photo.jpg"], "something else"),
        ("photos", "cannot be gone through"),
    ],
    ids=["none", "no-batches", "size", "bytes", "nan", "names", "text"],
)
def test_what_cannot_be_calibrated_on_is_refused(
    hne: treeify.HierarchicalEnsemble, tmp_path: Path, data: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(hne, tmp_path / "net", int8=data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        {"int8_labels": [0, 1]},
        {"int8": images(2), "int8_labels": [0]},
        {"int8": images(2), "int8_labels": [0.5, 1.5]},
        {"int8": images(2), "int8_held_out": images(2)},
        {"int8": images(2), "int8_held_out": (images(3), [0])},
    ],
    ids=["no-images", "few", "fractions", "no-pair", "others"],
)
def test_labels_that_do_not_fit_are_refused(
    hne: treeify.HierarchicalEnsemble, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        export(hne, tmp_path / "net", **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags : fpu avx2 avx_vnni\nflags : fpu\n", True),
        ("flags : fpu avx2 avx512f avx_vnni_int8\n", False),
        ("Features : fp asimd asimddp\n", False),
        ("", False),
    ],
)
def test_vnni_is_read_from_the_flags(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert quantised_graph.has_vnni(tmp_path / "cpuinfo") is expected


def test_there_is_no_vnni_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert quantised_graph.has_vnni(tmp_path / "cpuinfo") is False


def test_ranges_are_reduced_without_vnni(
    before: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treeify.deploy import quantise
    from treeify.deploy.quantisation_report import Comparison

    monkeypatch.setattr(quantise, "has_vnni", lambda: False)
    x = images(8).numpy()
    manifest, report = quantise.quantise(before.path, tmp_path, x, Comparison(x))
    assert manifest["quantised"]["reduced_range"] is True
    assert "reduced range" in report.scheme
    for row in manifest["steps"]:
        for tensor in onnx.load(tmp_path / row["file"]).graph.initializer:
            if tensor.data_type == INT8:
                assert np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() <= 64


def test_linear_layers_of_branches_run_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(16, 32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 5),
    )
    x = torch.rand(2, 16)
    hne = treeify.hierarchicalize(net, ["1:3"], init="fresh", example_input=x).eval()
    out = export(hne, tmp_path / "net", tune=False, int8=torch.rand(12, 16))
    assert [row["forms"] for row in out.manifest["steps"]][-1] == {"level 1": "looped"}
    assert [len(float_products(graph)) for graph in graphs(out)] == [1, 2]  # heads
