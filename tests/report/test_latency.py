"""Milliseconds of budgets are of one image on this machine, or are left out and it is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import treeify
from treeify.deploy.exported import ExportedEnsemble
from treeify.errors import CheckpointError
from treeify.report import reading
from treeify.report.api import Report, read
from treeify.report.exported_facts import _latency_table
from treeify.report.figures.latency import deadlines, first_of
from treeify.report.results import LatencyTable, Transition
from treeify.report.sections.accuracy import trade_off_section

STEPS = tuple(
    Transition(start, stop, 0.001 * stop, 0.002 * stop, 1.5)
    for start, stop in ((0, 1), (0, 2), (0, 4), (1, 2), (2, 4))
)


def table(batch: int, machine: str) -> LatencyTable:
    return LatencyTable(f"inference, {batch}x1x8x8 float32", batch, machine, "packed", STEPS, 5)


def budgets_and_what_is_said(report: Report, *tables: LatencyTable) -> tuple[list[str], str]:
    """The series of the trade-off in time, and what its section says is missing."""
    (result,) = report.contents.results
    contents = replace(report.contents, results=(replace(result, latencies=tables),))
    section = trade_off_section(contents)
    (chart,) = (chart for chart in section.charts if chart.name == "trade_off_ms")
    return [str(row[0]) for row in chart.table.rows], " ".join(section.missing)


def test_budgets_have_times_where_single_images_were_calibrated_here(report: Report) -> None:
    (result,) = report.contents.results
    assert result.times is not None
    here = result.times.machine
    assert [each.machine for each in result.latencies] == [here]
    series, missing = budgets_and_what_is_said(report, table(16, here), table(1, here))
    assert "tiny, budgets" in series
    assert "Budgets have no milliseconds" not in missing


@pytest.mark.parametrize(
    ("batches", "elsewhere", "said"),
    [
        ((16, 10), False, "only 10, 16 images together were calibrated"),
        ((1,), True, "calibrated elsewhere (another machine)"),
        ((), False, "nothing was calibrated"),
    ],
)
def test_other_calibrations_give_budgets_no_times(
    report: Report, batches: tuple[int, ...], elsewhere: bool, said: str
) -> None:
    (result,) = report.contents.results
    assert result.times is not None
    machine = "another machine" if elsewhere else result.times.machine
    tables = (table(batch, machine) for batch in batches)
    series, missing = budgets_and_what_is_said(report, *tables)
    assert "tiny, budgets" not in series
    assert said in missing


def test_single_images_are_drawn_before_batches() -> None:
    batch, single = table(16, "m"), table(1, "m")
    assert first_of([batch, single]) is single
    assert first_of([batch]) is batch
    assert first_of([]) is None
    assert "16 images together" in deadlines(batch, {}).description
    assert "together" not in deadlines(single, {}).description


def test_an_export_s_calibrations_tell_batch_and_machine(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from treeify.deploy import export

    hne = treeify.load(run / "last")
    path = tmp_path / "exported"
    export(hne, path, tune=False)
    exported = ExportedEnsemble(path)
    for images in (16, 1):
        exported.model.calibrate(torch.zeros(images, *hne.example).numpy(), repeats=3)
    report = read(path, data=["name=digits", "held_out=1497"])
    (result,) = report.contents.results
    assert [each.batch for each in result.latencies] == [16, 1]
    drawn = first_of(result.latencies)
    assert drawn is not None
    assert drawn.batch == 1
    assert result.times is not None
    assert drawn.machine == result.times.machine
    assert result.budgets
    (chart,) = (chart for chart in report.charts if chart.name == "trade_off_ms")
    assert any("budgets" in str(row[0]) for row in chart.table.rows)
    (measured, *_) = exported.model.latencies.values()
    with pytest.raises(CheckpointError, match="latencies of no shape"):
        _latency_table(replace(measured, situation="fast"), path)


def test_an_export_of_a_fixed_number_is_timed_for_one_image(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from treeify.deploy import export

    export(treeify.load(converted, trust=True), tmp_path / "exported", batch=4, tune=False)
    images = []
    seconds = reading.exported_seconds

    def counted(exported: ExportedEnsemble, x: torch.Tensor) -> dict[int, float]:
        images.append(len(x))
        return seconds(exported, x, budget=0.1)

    monkeypatch.setattr(reading, "exported_seconds", counted)
    (result,) = read(tmp_path / "exported").contents.results
    assert images == [1]
    assert result.times is not None
    assert result.times.seconds.keys() == {1, 2, 4}
