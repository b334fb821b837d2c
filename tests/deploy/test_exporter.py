"""An export is complete and compared, or not there."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.data import Preparation
from treeify.deploy import compare, directory, export, exporter, runtime
from treeify.deploy.runtime import Anytime
from treeify.errors import ExportError, LeafError

SPLITS = ["stage1", "stage2"]


def ensemble(splits: Any = SPLITS, size: int = 8) -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    x = torch.zeros(1, 3, size, size)
    return treeify.hierarchicalize(small.build(), splits, init="perturb", example_input=x).eval()


@pytest.fixture(scope="module")
def hne() -> treeify.HierarchicalEnsemble:
    return ensemble()


@pytest.fixture(scope="module")
def exported(hne: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "small"
    export(hne, out, tune=False)
    return out


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_every_size_answers_as_the_ensemble(hne: Any, exported: Path) -> None:
    model = Anytime(exported, threads=1)
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 8, 8)
        session = hne.session(x)
        for answer in model.anytime(x.numpy()):
            expected = session.advance(to=answer.leaves)
            assert_close(torch.from_numpy(answer.logits), expected.logits, rtol=1e-4, atol=1e-5)
            assert answer.macs == expected.macs


def test_files_are_disjoint_and_as_large_as_the_ensemble(hne: Any, exported: Path) -> None:
    seen: set[bytes] = set()
    total = 0
    for file in sorted(exported.glob("*.onnx")):
        weights = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(file).graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        ]
        contents = {weight.tobytes() for weight in weights if weight.size > 16}
        assert not contents & seen
        seen |= contents
        total += sum(weight.size for weight in weights)
    # A folded norm's scale and shift are in the convolution's weight and bias.
    norms = sum(
        tensor.numel()
        for name, tensor in hne.named_parameters()
        if name.endswith((".1.weight", ".1.bias"))
    )
    assert total == hne.count_parameters() - norms


def test_the_manifest_is_what_was_written(hne: Any, exported: Path) -> None:
    manifest = json.loads((exported / "ensemble.json").read_text("utf-8"))
    for row in manifest["steps"]:
        content = (exported / row["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (row["bytes"], row["sha256"])
        graph = onnx.load_from_string(content)
        onnx.checker.check_model(graph, full_check=True)
        assert [each.name for each in graph.graph.input] == [each["name"] for each in row["inputs"]]
        assert row["parity"]["largest_difference"] < 1e-5
        assert not any(node.doc_string or node.metadata_props for node in graph.graph.node)
    assert sum(row["macs"] for row in manifest["steps"]) == hne.count_macs()
    assert sum(row["parameters"] for row in manifest["steps"]) == hne.count_parameters()
    assert (exported / "anytime.py").read_bytes() == Path(runtime.__file__).read_bytes()


def test_steps_may_skip_sizes(hne: Any, tmp_path: Path) -> None:
    x = torch.rand(3, 3, 8, 8)
    for sizes in ([1, 4], [4], [2]):
        out = tmp_path / "-".join(map(str, sizes))
        export(hne, out, sizes=sizes, tune=False)
        model = Anytime(out, threads=1)
        assert model.sizes == tuple(sizes)
        logits = torch.from_numpy(model.predict(x.numpy()))
        assert_close(logits, hne.predict(x, leaves=sizes[-1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[3], [2, 1], [], [1, 1], [8], ["1"], 4])
def test_other_sizes_are_refused(hne: Any, tmp_path: Path, sizes: Any) -> None:
    with pytest.raises(LeafError):
        export(hne, tmp_path / "out", sizes=sizes)
    assert left_behind(tmp_path) == []


def test_a_fixed_number_of_images(hne: Any, tmp_path: Path) -> None:
    export(hne, tmp_path / "three", batch=3, tune=False)
    x = torch.rand(3, 3, 8, 8)
    model = Anytime(tmp_path / "three", threads=1)
    logits = torch.from_numpy(model.predict(x.numpy()))
    assert_close(logits, hne.predict(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(runtime.InputError):
        model.predict(x[:2].numpy())


def test_another_size_of_images(hne: Any, tmp_path: Path) -> None:
    preparation = Preparation((8, 8), (0.5,), (0.5,), classes=tuple("abcde"))
    hne.preparation = preparation
    try:
        out = export(hne, tmp_path / "large", input_size=(16, 12), tune=False)
    finally:
        hne.preparation = None
    x = torch.rand(2, 3, 16, 12)
    logits = Anytime(out.path, threads=1).predict(x.numpy())
    assert_close(torch.from_numpy(logits), hne.predict(x), rtol=1e-4, atol=1e-5)
    assert out.manifest["preparation"]["size"] == [16, 12]
    # Three times as many pixels, and the head once.
    assert out.manifest["macs"]["1"] > 2.5 * hne.count_macs(1)
    assert hne.preparation is None


def test_each_form_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from treeify.deploy import forms

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            widths = zip((8, 16, 16), (16, 16, 8), strict=True)
            self.block = nn.Sequential(*(nn.Conv2d(*each, 1) for each in widths))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x)).mean((2, 3)))

    x = torch.rand(2, 3, 8, 8)
    hne = treeify.hierarchicalize(
        Wide(), ["block.0", "block.1"], init="fresh", example_input=x
    ).eval()
    for form in (forms.GROUPED, forms.PRODUCT, forms.LOOPED):
        monkeypatch.setattr(forms.Forms, "_fastest", lambda self, level, span, form=form: form)
        out = export(hne, tmp_path / form)
        assert out.manifest["steps"][-1]["forms"]["level 2"] == form
        logits = Anytime(out.path, threads=1).predict(x.numpy())
        assert_close(torch.from_numpy(logits), hne.predict(x), rtol=1e-4, atol=1e-5)
        nodes = onnx.load(out.path / "step-03.onnx").graph.node
        groups = [
            attribute.i
            for node in nodes
            for attribute in node.attribute
            if node.op_type == "Conv" and attribute.name == "group"
        ]
        assert (max(groups, default=0) > 1) == (form == forms.GROUPED)
        assert len(groups) == {forms.GROUPED: 2, forms.PRODUCT: 1, forms.LOOPED: 4}[form] + 1


def test_forms_are_measured(hne: Any, tmp_path: Path) -> None:
    told: list[exporter.Progress] = []
    out = export(hne, tmp_path / "tuned", observe=told.append)
    assert set(out.manifest["steps"][-1]["forms"].values()) <= {"grouped", "product", "looped"}
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert (told[0].what, told[0].done) == ("measuring how levels run", 0.0)
    assert (told[-1].what, told[-1].done) == ("done", 1.0)
    assert sum(each.what == told[0].what for each in told) == 6  # levels of every step


class Several(nn.Module):
    """Returns a dict with a tuple and a constant in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small.build()
        self.other = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return {"logits": logits, "pair": (self.other(logits), logits.argmax(1))}


def test_outputs_keep_their_structure(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 8, 8)
    hne = treeify.hierarchicalize(
        Several(), ["net.stage1", "net.stage2"], init="perturb", example_input=x
    ).eval()
    out = export(hne, tmp_path / "several", tune=False)
    assert out.manifest["output"] == {
        "dict": {
            "logits": {"tensor": "logits_0"},
            "pair": {"tuple": [{"tensor": "logits_1"}, {"tensor": "logits_2"}]},
        }
    }
    expected, actual = hne.predict(x), Anytime(out.path, threads=1).predict(x.numpy())
    assert_close(torch.from_numpy(actual["logits"]), expected["logits"], rtol=1e-4, atol=1e-5)
    assert_close(torch.from_numpy(actual["pair"][0]), expected["pair"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.from_numpy(actual["pair"][1]), expected["pair"][1])


def test_the_ensemble_stays_as_it_is(tmp_path: Path) -> None:
    hne = ensemble().train()
    before = {key: tensor.clone() for key, tensor in hne.state_dict().items()}
    modes = {name: module.training for name, module in hne.named_modules()}
    random = torch.get_rng_state()
    export(hne, tmp_path / "out", tune=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in hne.state_dict().items())
    assert {name: module.training for name, module in hne.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    hne = ensemble().bfloat16()
    out = export(hne, tmp_path / "out", tune=False)
    x = torch.rand(2, 3, 8, 8)
    logits = Anytime(out.path, threads=1).predict(x.numpy())
    assert_close(torch.from_numpy(logits), ensemble_in_float(hne).predict(x), rtol=1e-4, atol=1e-5)
    assert next(hne.parameters()).dtype == torch.bfloat16


def ensemble_in_float(hne: treeify.HierarchicalEnsemble) -> treeify.HierarchicalEnsemble:
    other = ensemble()
    other.load_state_dict({key: tensor.float() for key, tensor in hne.state_dict().items()})
    return other


def test_what_answers_differently_is_not_written(
    hne: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = exporter.save_model

    def wrong(model: Any, file: Path) -> None:
        save(model, file)
        graph = onnx.load(file)
        tensor = next(each for each in graph.graph.initializer if len(each.dims) == 4)
        values = onnx.numpy_helper.to_array(tensor) * 1.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
        onnx.save(graph, file)

    monkeypatch.setattr(exporter, "save_model", wrong)
    with pytest.raises(ExportError, match="step 1 of 3 answers differently"):
        export(hne, tmp_path / "out", tune=False)
    assert left_behind(tmp_path) == []
    export(hne, tmp_path / "out", tune=False, verify=False)
    assert Anytime(tmp_path / "out", threads=1).manifest["steps"][0]["parity"] is None
    with pytest.raises(ExportError, match="answers differently"):
        compare.compare(hne, tmp_path / "out", [2])


def test_a_full_disk_leaves_nothing_behind(
    hne: Any, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    before = left_behind(tmp_path)

    def full(model: Any, file: Path) -> None:
        file.write_bytes(b"half")
        if file.name == "step-02.onnx":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "save_model", full)
    for new in (tmp_path / "new", tmp_path / "exported" / "by" / "name"):
        with pytest.raises(ExportError, match="No space left"):
            export(hne, new, tune=False)
    with pytest.raises(ExportError, match="No space left"):
        export(hne, tmp_path / "out", tune=False, overwrite=True)
    assert left_behind(tmp_path) == before
    x = torch.rand(2, 3, 8, 8)
    logits = Anytime(tmp_path / "out", threads=1).predict(x.numpy())
    assert_close(torch.from_numpy(logits), hne.predict(x), rtol=1e-4, atol=1e-5)


def test_only_exports_are_overwritten(hne: Any, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    for overwrite, message in ((False, "not empty"), (True, "something else than an export")):
        with pytest.raises(ExportError, match=message):
            export(hne, tmp_path / "photos", overwrite=overwrite, tune=False)
    with pytest.raises(ExportError, match="is a file"):
        export(hne, tmp_path / "photos" / "mine.jpg", tune=False)
    assert left_behind(tmp_path) == ["mine.jpg", "photos"]
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "latencies.json").write_text("{}")
    export(hne, tmp_path / "out", sizes=[1, 4], overwrite=True, tune=False)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"ensemble.json", "anytime.py", "README.md", "step-01.onnx", "step-02.onnx"}
    (tmp_path / "empty").mkdir()
    export(hne, tmp_path / "empty", tune=False)
    assert (tmp_path / "empty" / "step-03.onnx").is_file()


def test_missing_packages_are_named(
    hne: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ExportError, match=r"onnxscript.*\n.*treeify\[onnx\]"):
        export(hne, tmp_path / "out")
    assert left_behind(tmp_path) == []


@pytest.mark.thorough
def test_it_runs_where_there_is_no_torch(exported: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    packages = ["numpy", "onnxruntime"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, check=False
    )
    if installed.returncode:
        pytest.skip("packages cannot be installed here")
    x = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    np.save(tmp_path / "images.npy", x)
    code = (
        "import sys; sys.path.insert(0, 'export')\n"
        "import numpy, anytime\n"
        "model = anytime.Anytime('export', threads=1)\n"
        "answers = [step.logits for step in model.anytime(numpy.load('images.npy'))]\n"
        "numpy.save('logits.npy', numpy.stack(answers))\n"
        "assert 'torch' not in sys.modules\n"
    )
    shutil.copytree(exported, tmp_path / "export")
    result = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = [answer.logits for answer in Anytime(exported, threads=1).anytime(x)]
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), np.stack(expected))
