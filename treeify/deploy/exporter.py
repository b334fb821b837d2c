"""An ensemble -> a directory that answers without PyTorch, complete and compared, or not there."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treeify.arguments import as_path
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.deploy import runtime
from treeify.deploy.dense_steps import StepPlans, key_of
from treeify.deploy.directory import check_writable, publish, require_packages
from treeify.deploy.formats import MANIFEST, README, RUNTIME
from treeify.deploy.manifest import manifest_of, row_of
from treeify.deploy.readme import readme
from treeify.deploy.resized import resized
from treeify.engine.program import PACKED
from treeify.errors import ExportError, InputError

if TYPE_CHECKING:  # they need packages of an extra
    from treeify.deploy.quantisation_report import Comparison, QuantisationReport
    from treeify.deploy.runtime import Array

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
        # What takes long, before steps are put together of it.
        spans = self.plans.spans(self.sizes)
        what = "measuring how levels run" if self.tune else "tracing"
        for index, (number, level, span) in enumerate(spans):
            self.observe(Progress(number, count, what, _TRACED * index / len(spans)))
            if forms.choose(level, span) == PACKED:
                translator.graph(key_of(level, span), products=False)
        steps = self.plans.steps(self.sizes, forms.choose)
        rows = []
        for number, step in enumerate(steps, 1):
            self._report(number, "writing", _TRACED, (number - 1) / count)
            file = folder / f"step-{number:02d}.onnx"
            save_model(translator.model(step, forms.products(step)), file)
            rows.append(row_of(self.plans.hne, step, file, forms.described(step)))
        manifest = manifest_of(self.plans, self.sizes, self.name, rows)
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

    def _parity(self, folder: Path) -> list[dict[str, Any]]:
        """Compare the files with the ensemble; the largest differences of each step."""
        from treeify.deploy.compare import compare

        batches = (1, 3) if self.plans.dynamic else (self.plans.images,)
        return compare(self.plans.hne, folder, batches)


def save_model(model: Any, file: Path) -> None:
    """Write a model, whole."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # What the translation notes of each node, lines of source code included.
    ClearMetadataAndDocStringPass()(model)
    ir.save(model, file)
