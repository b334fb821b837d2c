"""An ensemble -> a directory that answers without PyTorch, complete and compared, or not there."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from treeify import files
from treeify.anytime.confidence import BUDGET
from treeify.arguments import as_path
from treeify.conversion.assemble import assemble
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.conversion.initialize import Source
from treeify.data.preparation import PREPARATION
from treeify.deploy import runtime
from treeify.deploy.dense_steps import StepPlans
from treeify.deploy.formats import FORMAT, MANIFEST, OPSET, README, RUNTIME, VERSION
from treeify.deploy.readme import readme
from treeify.deploy.step import Step, output_names
from treeify.deploy.values import BatchDim
from treeify.errors import ExportError, InputError

if TYPE_CHECKING:  # they need packages of an extra
    from treeify.deploy.quantisation_report import Comparison, QuantisationReport
    from treeify.deploy.runtime import Array

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Measuring forms and writing files take about as long as tracing.
_TRACED, _WRITTEN, _COMPARED = 0.7, 0.9, 0.95


@dataclass(frozen=True)
class Progress:
    """How far an export is.

    Args:
        step: the step that is being made, from 1.
        steps: how many there are.
        what: what is being done.
        done: fraction of all work, 0 to 1.
    """

    step: int
    steps: int
    what: str
    done: float


Observer = Callable[[Progress], None]


@dataclass(frozen=True)
class Exported:
    """An exported ensemble.

    Args:
        path: its directory.
        manifest: what `ensemble.json` says.
        quantisation: of an export in 8 bits, what it costs and gains.
    """

    path: Path
    manifest: dict[str, Any]
    quantisation: "QuantisationReport | None" = None

    def __str__(self) -> str:
        """One line for each step."""
        rows = self.manifest["steps"]
        lines = [f"{self.path}: {len(rows)} steps"]
        for number, row in enumerate(rows, 1):
            line = (
                f"step {number} of {len(rows)}: {row['leaves']} leaves, {row['bytes'] / 1e6:.2f} MB"
            )
            if row["parity"] is not None:
                difference = row["parity"]["largest_difference"]
                line += f", largest difference {difference:.1e} of the largest logit"
            lines.append(line)
        if self.quantisation is not None:
            lines.append(str(self.quantisation))
        return "\n".join(lines)


def export(
    hne: HierarchicalEnsemble,
    out: str | Path,
    *,
    sizes: Iterable[int] | None = None,
    batch: int | str = "dynamic",
    input_size: tuple[int, int] | None = None,
    int8: Any = None,
    int8_labels: Any = None,
    int8_held_out: Any = None,
    tune: bool = True,
    verify: bool = True,
    overwrite: bool = False,
    name: str | None = None,
    observe: Observer = lambda progress: None,
) -> Exported:
    """Write an ensemble as ONNX files, one for each size, with a runtime that needs no PyTorch.

    Args:
        hne: the ensemble. Not modified.
        out: a new or empty directory.
        sizes: increasing nested sizes at which a step ends; all of them if not given.
        batch: how many images there will be; "dynamic" for any number.
        input_size: height and width of images, instead of those it was converted for.
        int8: training images, prepared as in evaluation, `[N, C, H, W]` or batches of them, to
            write files in 8 bits for the ranges of values seen there. Some hundred are enough.
        int8_labels: their classes, `[N]`, to report the accuracy of both.
        int8_held_out: other images and their classes, to report the accuracy on those instead.
        tune: measure on this machine how each level runs fastest; else all are grouped.
        verify: compare the files' answers with `hne.session`.
        overwrite: replace an export that is there.
        name: of the model, for the files' readers; the directory's if not given.
        observe: called as the work goes on.

    Returns:
        The directory and what its `ensemble.json` says; prints as one line per step.

    Raises:
        ExportError: the model cannot be exported, what was exported answers differently, the
            directory cannot be written, or packages are missing. Nothing is left behind.
        LeafError: a size is no nested one.
    """
    require_ensemble(hne)
    require_packages()
    final = as_path("out", out, ExportError)
    check_writable(final, overwrite=overwrite)
    if input_size is not None and tuple(hne.example[1:]) != tuple(input_size):
        hne = resized(hne, input_size)
    plans = StepPlans(hne, batch=None if batch == "dynamic" else int(batch))
    chosen = plans.check_sizes(sizes)
    writer = _Writer(plans, chosen, name or final.name, observe, tune=tune, verify=verify)
    writer.calibration = _calibration(plans.image_shape, int8, int8_labels, int8_held_out)
    manifest: dict[str, Any] = {}
    try:
        publish(final, lambda draft: manifest.update(writer.write(draft)), overwrite=overwrite)
    except OSError as error:
        raise ExportError(
            f"{final} cannot be written: {error}", next_step="Nothing has changed there."
        ) from error
    return Exported(final, manifest, writer.quantisation)


def _calibration(
    shape: tuple[int, ...], int8: Any, labels: Any, held_out: Any
) -> "tuple[Array, Comparison] | None":
    """The images to calibrate on, and what to compare both exports with."""
    if int8 is None:
        if labels is not None or held_out is not None:
            raise InputError(
                "labels for comparing with 8 bits were given, and no images to calibrate on.",
                expected="int8=images",
            )
        return None
    from treeify.deploy.quantise import calibration_images, comparison

    images = calibration_images("int8", int8, shape)
    return images, comparison(images, labels, held_out, shape)


def require_packages() -> None:
    """Raise ExportError unless what exporting needs is installed."""
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ExportError(
            f"exporting needs {', '.join(missing)}, which is not installed.",
            next_step="pip install 'treeify[onnx]'",
        )


def is_export(path: Path) -> bool:
    """Whether a directory was written by `export`, or says so."""
    try:
        text = files.read_bytes(path / MANIFEST, 2**24)
        return bool(json.loads(text).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def check_writable(final: Path, *, overwrite: bool) -> None:
    """Raise ExportError unless an export may be written there."""
    exists = next(each for each in (final, *final.absolute().parents) if each.exists())
    if not exists.is_dir():
        raise ExportError(f"{exists} is a file.", expected="a directory, new or empty")
    if not final.is_dir() or not any(final.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"{final} is not empty.",
            expected="a new or empty directory",
            next_step="Choose another one, or pass --overwrite (overwrite=True).",
        )
    if not is_export(final):
        raise ExportError(
            f"{final} holds something else than an export, and is not overwritten.",
            expected=f"a directory with {MANIFEST}",
            next_step="Choose another one.",
        )


def publish(final: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Make the directory at once; what was there stays until then."""
    if not final.exists():
        files.publish(final, write)
        return
    fresh = files.unused(final.with_name(f"{final.name}-new"))
    files.publish(fresh, write)
    if any(final.iterdir()):
        assert overwrite
        files.withdraw(final)
    else:
        final.rmdir()
    fresh.rename(final)


def resized(hne: HierarchicalEnsemble, input_size: tuple[int, int]) -> HierarchicalEnsemble:
    """The same ensemble for images of another size."""
    like = hne.example_images(1)
    x = like.new_zeros((1, hne.example[0], *input_size))
    other = assemble(
        hne.leaf(0), hne.architecture, list(hne.conversion.splits.specs), example_input=x
    )
    tensors = hne.packed_tensors

    def branch(leaf: int) -> dict[str, Tensor]:
        return {key: hne.part(key, leaf, tensor) for key, tensor in tensors.items()}

    other.fill(Source(branch, by_leaf=True))
    if hne.preparation is not None:
        other.preparation = replace(hne.preparation, size=input_size)
    other.budgets = dict(hne.budgets)
    return other.eval()


@dataclass
class _Writer:
    plans: StepPlans
    sizes: tuple[int, ...]
    name: str
    observe: Observer
    tune: bool
    verify: bool
    calibration: "tuple[Array, Comparison] | None" = None
    quantisation: "QuantisationReport | None" = None

    def write(self, folder: Path) -> dict[str, Any]:
        """Fill a directory; what its manifest says."""
        if self.calibration is None:
            manifest = self._write_float(folder)
        else:
            manifest = self._write_quantised(folder, *self.calibration)
        self.observe(Progress(len(self.sizes), len(self.sizes), "done", 1.0))
        return manifest

    def _write_quantised(self, folder: Path, images: "Array", data: "Comparison") -> dict[str, Any]:
        """Write it in float first, compared with PyTorch, then quantise that."""
        from treeify.deploy.quantise import quantise

        whole = folder / "float32"
        whole.mkdir()
        self._write_float(whole)
        self._report(len(self.sizes), "quantising", _COMPARED, 0)
        manifest, self.quantisation = quantise(whole, folder, images, data)
        shutil.copyfile(runtime.__file__, folder / RUNTIME)
        (folder / README).write_text(readme(manifest), encoding="utf-8")
        shutil.rmtree(whole)
        return manifest

    def _write_float(self, folder: Path) -> dict[str, Any]:
        """Fill a directory with files in float32; what its manifest says."""
        from treeify.deploy.forms import Forms
        from treeify.deploy.onnx_graph import Translator

        translator = Translator(self.plans)
        forms = Forms(translator, measure=self.tune, quantised=self.calibration is not None)
        count = len(self.sizes)
        self.observe(Progress(1, count, "measuring how levels run" if self.tune else "tracing", 0))
        steps = self.plans.steps(self.sizes, forms.choose)
        rows = []
        for number, step in enumerate(steps, 1):
            self._report(number, "writing", _TRACED, (number - 1) / count)
            file = folder / f"step-{number:02d}.onnx"
            save_model(translator.model(step, forms.products(step)), file)
            rows.append(self._row(step, file, forms))
        manifest = self._manifest(rows)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(runtime.__file__, folder / RUNTIME)
        if self.verify:
            self._report(count, "comparing", _WRITTEN, 0)
            for row, parity in zip(rows, self._parity(folder), strict=True):
                row["parity"] = parity
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (folder / README).write_text(readme(manifest), encoding="utf-8")
        return manifest

    def _report(self, number: int, what: str, base: float, part: float) -> None:
        share = 0.2 if base == _TRACED else 0.1
        self.observe(Progress(number, len(self.sizes), what, base + share * part))

    def _row(self, step: Step, file: Path, forms: Any) -> dict[str, Any]:
        hne, content = self.plans.hne, file.read_bytes()
        leaf_outputs = step.outputs[: len(step.outputs) - len(step.kept)]
        before = (
            (hne.count_macs(step.start), hne.count_parameters(step.start)) if step.start else (0, 0)
        )
        return {
            "file": file.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "parameters": hne.count_parameters(step.leaves) - before[1],
            "start": step.start,
            "leaves": step.leaves,
            "macs": hne.count_macs(step.leaves) - before[0],
            "inputs": [{"name": name} for name in step.inputs],
            "outputs": [
                *({"name": name, "kind": "leaves"} for name in leaf_outputs),
                *(
                    {
                        "name": kept.name,
                        "kind": "kept",
                        "dtype": str(kept.example.dtype).removeprefix("torch."),
                        "shape": shape_of(kept.example, kept.batch_dim),
                        "batch_dim": None if kept.batch_dim is None else kept.batch_dim[0],
                    }
                    for kept in step.kept
                ),
            ],
            "forms": forms.described(step),
            "parity": None,
        }

    def _manifest(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        hne, plans = self.plans.hne, self.plans
        preparation = None
        if hne.preparation is not None:
            preparation = PREPARATION.dump_python(hne.preparation, mode="json")
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "versions": {
                "treeify": version("treeify"),
                **{package: version(package) for package in ("torch", *_PACKAGES)},
                "opset": OPSET,
            },
            "classes": None if preparation is None else preparation["classes"],
            "preparation": preparation,
            "tree": {
                "fanouts": list(hne.tree.fanouts),
                "leaves": hne.leaves,
                "nested_sizes": list(hne.tree.nested_sizes),
                "splits": list(hne.conversion.splits.specs),
            },
            "sizes": list(self.sizes),
            "images": {
                "shape": ["batch" if plans.dynamic else plans.images, *plans.image_shape],
                "dtype": "float32",
            },
            "macs": {str(size): hne.count_macs(size) for size in self.sizes},
            "output": structure_of(plans.output),
            "droppable": all(crossing.rows for crossing in plans.program.crossings.values()),
            "budgets": [
                BUDGET.dump_python(budget, mode="json", by_alias=True)
                for budget in hne.budgets.values()
                if budget.sizes == self.sizes
            ],
            "quantised": None,
            "steps": rows,
        }

    def _parity(self, folder: Path) -> list[dict[str, Any]]:
        """Compare the files with the ensemble; the largest differences of each step."""
        from treeify.deploy.compare import compare

        batches = (1, 3) if self.plans.dynamic else (self.plans.images,)
        return compare(self.plans.hne, folder, batches)


def shape_of(example: Tensor, batch_dim: BatchDim) -> list[int | str]:
    """A tensor's shape with its batch by name."""
    shape: list[int | str] = list(example.shape)
    if batch_dim is not None:
        dim, times = batch_dim
        shape[dim] = "batch" if times == 1 else f"batch*{times}"
    return shape


def structure_of(output: Any) -> dict[str, Any]:
    """The structure of the model's output, as JSON values."""
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(output))
    names = iter(output_names(count))

    def structure(value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return {"tensor": next(names)}
        if isinstance(value, dict):
            return {"dict": {str(key): structure(each) for key, each in value.items()}}
        if isinstance(value, tuple | list):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [structure(each) for each in value]}
        return {"constant": value}

    return structure(output)


def save_model(model: Any, file: Path) -> None:
    """Write a model, whole."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # What the translation notes of each node, lines of source code included.
    ClearMetadataAndDocStringPass()(model)
    ir.save(model, file)
