"""Draws docs/figures: the paper's figures in the form that the results beside the pages give.

`python docs/figures.py` after results or published points have changed. Files are the same, bit by
bit, for the same numbers and release of matplotlib; each holds a digest of its numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import treeify
from treeify.evaluation.cost import costs
from treeify.evaluation.metrics import Score
from treeify.models.cifar_resnet import cifar_resnet50
from treeify.report import style
from treeify.report.chart import Chart
from treeify.report.figures.leaves import leaf_accuracy, logit_std
from treeify.report.figures.trade_off import trade_off
from treeify.report.grids import read_rows
from treeify.report.published import Series, published
from treeify.report.series import Curve, Spread
from treeify.training.recipe_file import load_recipe

DOCS = Path(__file__).parent
FOLDER, RESULTS, RECIPES = DOCS / "figures", DOCS / "results", DOCS.parent / "recipes"

DIGITS = "360 held-out digits, five seeds."
JPEG = "10,000 held-out images, one seed, six epochs of the paper's 200."
FOUR = ("L_I", "L_S", "L_CD 0.5", "L_HD")  # more bands hide one another


def charts() -> Iterator[Chart]:
    """Every figure there is."""
    digits = RESULTS / "digits.json", macs("digits_hne.yaml", 8)
    yield accuracies("figure3_accuracy_digits", "Four losses on digits", *digits, DIGITS, FOUR)
    yield deviations(
        "figure3_logit_std_digits", "How much leaves differ on digits", *digits, DIGITS
    )
    for loss in ("L_I", "L_HD"):
        yield single_leaves(f"figure4_{loss}_digits", f"{loss} on digits", loss)
    yield shapes("figure5_digits", "Tree, one split and independent networks on digits")
    for data_set, title in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")):
        yield beside_others(f"figure6_{data_set}", f"Anytime models on {title}", data_set)
    jpeg = RESULTS / "cifar10_jpeg" / "results.json", macs("cifar10_jpeg_hne.yaml", 32)
    title = "Four losses on CIFAR-10 as JPEG"
    yield accuracies("figure9_accuracy_cifar10_jpeg", title, *jpeg, JPEG)
    title = "How much leaves differ on CIFAR-10 as JPEG"
    yield deviations("figure9_logit_std_cifar10_jpeg", title, *jpeg, JPEG)


def macs(recipe: str, pixels: int) -> tuple[int, ...]:
    """MACs of every nested size of a recipe's ensemble, for images of so many pixels a side."""
    model = load_recipe(RECIPES / recipe).model
    hne = treeify.hierarchicalize(
        cifar_resnet50(**model.kwargs),
        model.splits,
        init="copy",
        example_input=torch.zeros(1, 3, pixels, pixels),
    )
    return tuple(cost.macs for cost in costs(hne))


def accuracies(
    name: str,
    title: str,
    file: Path,
    sizes: Sequence[int],
    note: str,
    variants: Sequence[str] | None = None,
) -> Chart:
    """Held-out accuracy against MACs, a curve for each variant of a grid."""
    curves = list(_curves(file, sizes, "accuracy"))
    kept = [curve for curve in curves if variants is None or curve.name in variants]
    return trade_off(kept, name=name, title=title, note=note)


def deviations(name: str, title: str, file: Path, sizes: Sequence[int], note: str) -> Chart:
    """Standard deviation of the logits against MACs, a curve for each variant of a grid."""
    return logit_std(list(_curves(file, sizes, "logit_std")), name=name, title=title, note=note)


def _curves(file: Path, sizes: Sequence[int], score: str) -> Iterator[Curve]:
    by_variant: dict[str, list[Sequence[Score]]] = defaultdict(list)
    for row in read_rows(file):
        by_variant[row.variant].append(row.held_out)
    for variant, runs in by_variant.items():
        leaves = tuple(own.leaves for own in runs[0])
        values = [
            Spread.of([getattr(own, score) for own in scores]) for scores in zip(*runs, strict=True)
        ]
        yield Curve(variant, leaves, tuple(sizes), tuple(values))


def single_leaves(name: str, title: str, loss: str) -> Chart:
    """Accuracy of nested sizes over that of single leaves, from `treeify eval --json`."""
    files = sorted((RESULTS / "digits_leaves" / loss).glob("seed*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    scores = list(zip(*(run["scores"] for run in runs), strict=True))
    return leaf_accuracy(
        [own[0]["leaves"] for own in scores],
        [Spread.of([run["accuracy"] for run in own]) for own in scores],
        [Spread.of(own) for own in zip(*(run["leaf_accuracy"] for run in runs), strict=True)],
        name=name,
        title=title,
        note=f"{DIGITS} Lines at the bars reach from the least to the most.",
    )


def shapes(name: str, title: str) -> Chart:
    """Accuracy of first leaves of ensembles of several shapes, from docs/first_leaves.py."""
    rows = json.loads((RESULTS / "digits_figure5.json").read_text(encoding="utf-8"))
    curves = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        scores = list(zip(*(run["held_out"] for run in runs), strict=True))
        values = tuple(Spread.of([score["accuracy"] for score in own]) for own in scores)
        leaves = tuple(own[0]["leaves"] for own in scores)
        curves.append(Curve(variant, leaves, tuple(runs[0]["macs"]), values))
    note = f"Independent loss, 1 to 16 first leaves of 16 in each. {DIGITS}"
    return trade_off(curves, name=name, title=title, note=note)


def beside_others(name: str, title: str, data_set: str) -> Chart:
    """The paper's Table 1, with hierarchical distillation, beside other published points."""
    every = published(data_set)
    own = [series for series in every if "L_HD" in series.name]
    others = [series for series in every if "HNE" not in series.name]
    notes = [f"HNE: {own[0].source}; MACs: {own[0].macs_are}."]
    for series in others:
        notes.append(f"{series.name}, MACs: {series.macs_are}.")
        if series.setting == "budgeted":
            notes.append("There images stop by confidence; for HNE none does.")
    return trade_off(
        [_as_curve(series) for series in own],
        published=others,
        name=name,
        title=title,
        note=" ".join(notes),
    )


def _as_curve(series: Series) -> Curve:
    sizes, accuracies = zip(*series.points, strict=True)
    leaves = tuple(2**level for level in range(len(sizes)))
    return Curve(series.name, leaves, sizes, tuple(Spread.of([value]) for value in accuracies))


def digest(chart: Chart) -> str:
    """Of all that a chart says: it differs where a number does, whatever drew it."""
    said = [chart.name, chart.title, chart.description, chart.table.cells]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def svg(chart: Chart) -> str:
    """A chart as a file."""
    content = io.StringIO()
    metadata = {"Date": None, "Title": chart.title, "Description": digest(chart)}
    with style.styled(chart.name):
        chart.figure.savefig(content, format="svg", facecolor=style.PAPER, metadata=metadata)
    return "".join(f"{line.rstrip()}\n" for line in content.getvalue().splitlines())


if __name__ == "__main__":
    drawn = {FOLDER / f"{chart.name}.svg": svg(chart) for chart in charts()}
    FOLDER.mkdir(exist_ok=True)
    for path in set(FOLDER.glob("*.svg")) - set(drawn):
        path.unlink()
    for path, text in drawn.items():
        path.write_text(text, encoding="utf-8")
