"""Reports in Python: what directories hold becomes figures, a page, and files."""

import json
import shutil
from dataclasses import replace
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from pytest import approx
from runner import run as run_command

import treeify
from treeify.errors import CheckpointError, DataError, InputError, TreeifyError
from treeify.report.api import Report, read, with_published
from treeify.report.published import published

ALL = {
    *("trade_off", "trade_off_ms", "tree", "level_costs", "leaf_accuracy", "accuracy_of_sizes"),
    *("logit_std", "reliability", "changes", "worst_pairs", "class_accuracy", "confusion"),
    *("loss", "accuracies", "rates", "epoch_times", "latencies", "deadlines", "budgets"),
    *("packed", "parity"),
}


def rows(report: Report, name: str) -> list[dict[str, Any]]:
    """The numbers of a chart, by their headings."""
    (chart,) = (chart for chart in report.charts if chart.name == name)
    headings = [column.heading for column in chart.table.columns]
    return [dict(zip(headings, row, strict=True)) for row in chart.table.rows]


def test_a_run_has_every_figure_as_matplotlibs(report: Report) -> None:
    assert report.figures.keys() == ALL
    assert all(isinstance(figure, Figure) for figure in report.figures.values())
    assert all(chart.title and chart.description and chart.table.rows for chart in report.charts)
    assert treeify.report.read is read


def test_numbers_are_those_of_treeify_eval(report: Report, run: Path) -> None:
    done = run_command("eval", str(run), "--no-latency", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    own = [row for row in rows(report, "trade_off") if row["leaves"]]
    assert [row["accuracy %"] for row in own] == [row["accuracy"] for row in found["scores"]]
    assert [row["MACs"] for row in own] == [row["macs"] for row in found["scores"]]
    assert [row["by itself %"] for row in rows(report, "leaf_accuracy")] == found["leaf_accuracy"]
    deviations = [row["logit std"] for row in rows(report, "logit_std")]
    assert deviations == [row["logit_std"] for row in found["scores"]]


def test_the_base_model_stands_beside_where_its_weights_are_known(
    report: Report, run: Path, tmp_path: Path
) -> None:
    (unknown,) = (row for row in rows(report, "trade_off") if row["series"] == "base model")
    assert unknown["accuracy %"] is None
    torch.save(treeify.load(run / "last").leaf(1).state_dict(), tmp_path / "base.pth")
    known = read(run, weights=tmp_path / "base.pth", verify=False)
    singles = [row["by itself %"] for row in rows(known, "leaf_accuracy")]
    for name in ("trade_off", "trade_off_ms"):
        (row,) = (row for row in rows(known, name) if row["series"] == "base model")
        assert row["accuracy %"] == singles[1]
    with pytest.raises(InputError, match="several directories"):
        read(run, run, weights=tmp_path / "base.pth")


def test_published_points_stand_in_a_figure_of_their_own(report: Report) -> None:
    (result,) = report.contents.results
    contents = replace(report.contents, results=(replace(result, data_set="cifar10"),))
    beside = Report(with_published(contents))
    found = [row for row in rows(beside, "published") if row["source"] is not None]
    assert {(row["series"], row["MACs"], row["accuracy %"]) for row in found} == {
        (series.name, *point) for series in published("cifar10") for point in series.points
    }
    assert all(row["source"].startswith(("printed: ", "digitised: ")) for row in found)
    assert rows(beside, "trade_off") == rows(report, "trade_off")


def test_what_changes_adds_up_to_the_accuracies(report: Report) -> None:
    (result,) = report.contents.results
    answers = result.answers
    assert answers is not None
    images = len(answers.target)
    assert images == 1497
    correct = [round(score.accuracy * images / 100) for score in answers.scores]
    for row, before, after in zip(rows(report, "changes"), correct, correct[1:], strict=False):
        assert row["become right"] - row["become wrong"] == row["net"] == after - before
        assert row["still wrong"] == images - after
    by_class = rows(report, "class_accuracy")
    right = sum(row["images"] * row["4 leaves %"] / 100 for row in by_class)
    assert right == approx(correct[-1])
    pairs = rows(report, "worst_pairs")
    assert sum(row["4 leaves"] for row in pairs) == images - correct[-1]
    assert sum(row["images"] for row in rows(report, "confusion")) == images


def test_reliability_bins_give_the_calibration_error(report: Report) -> None:
    (result,) = report.contents.results
    assert result.answers is not None
    bins = rows(report, "reliability")
    for score in result.answers.scores:
        own = [row for row in bins if row["leaves"] == score.leaves]
        gaps = sum(row["images"] * abs(row["confidence %"] - row["accuracy %"]) for row in own)
        assert gaps / 1497 == approx(score.calibration_error, abs=1e-3)


def test_the_tree_is_the_ensembles(report: Report, run: Path) -> None:
    hne = treeify.load(run / "last")
    levels = rows(report, "tree")
    assert [row["branches"] for row in levels] == list(hne.tree.branches)
    assert sum(row["MACs of all"] for row in levels) == hne.count_macs()
    assert sum(row["parameters"] for row in levels) == hne.count_parameters()
    tensors = hne.packed_tensors.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(row["bytes"] for row in levels) == size
    assert [row["begins at"] for row in levels] == ["the image", "block3", "block4"]


def test_the_training_is_the_runs(report: Report, run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [json.loads(line) for line in lines]
    assert [row["loss"] for row in rows(report, "loss")] == [epoch["loss"] for epoch in epochs]
    held_out = [row["held out, 4 leaves %"] for row in rows(report, "accuracies")]
    assert held_out == [epoch["held_out"][-1]["accuracy"] for epoch in epochs]
    rates = [row["learning rate"] for row in rows(report, "rates")]
    assert 0 < rates[1] < rates[0] < 0.05  # along a cosine from 0.05


def test_latencies_deadlines_and_budgets_are_the_saved_ones(report: Report, run: Path) -> None:
    hne = treeify.load(run / "last")
    ((_, latencies),) = hne.latencies.items()
    for row in rows(report, "latencies"):
        key = row["from leaves"], row["to leaves"]
        assert row["median ms"] == approx(1e3 * latencies.typical[key])
        assert row["99th percentile ms"] == approx(1e3 * latencies.slow[key])
    for row in rows(report, "deadlines"):
        key = 0, row["leaves"]
        deadline = 1e3 * latencies.typical[key] * latencies.margins[key]
        assert row["deadline ms from"] == approx(deadline)
    ((target, budget),) = hne.budgets.items()
    (timed,) = (row for row in rows(report, "trade_off_ms") if row["series"] == "tiny, budgets")
    ways = [latencies.typical[0, 1], latencies.typical[1, 2], latencies.typical[2, 4]]
    seconds = [sum(ways[:count]) for count in (1, 2, 3)]
    assert timed["ms"] == approx(1e3 * sum(map(mul, budget.fractions, seconds)))
    (row,) = rows(report, "budgets")
    assert (row["target MACs"], row["accuracy %"]) == (target, approx(100 * budget.accuracy))


def test_an_untrained_ensemble_has_what_is_known_of_it(converted: Path) -> None:
    report = read(converted, trust=True, latency=False)
    assert report.figures.keys() == {"tree", "level_costs", "packed", "parity"}
    shown = [section.key for section in report.sections if not section.is_empty]
    assert shown == ["tree", "conversion", "provenance"]
    assert all(section.missing for section in report.sections if section.is_empty)
    page = report.html()
    assert "What is left out" in page
    assert "no run wrote it" in page


def test_data_can_be_named_for_an_ensemble(converted: Path) -> None:
    report = read(converted, data=["name=digits"], trust=True, latency=False, verify=False)
    assert {"trade_off", "reliability", "changes"} <= report.figures.keys()
    with pytest.raises(TreeifyError, match="no_such_data"):
        read(converted, data=["name=no_such_data"], trust=True)


def test_an_export_has_its_files_and_their_parity(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from treeify.deploy import export

    export(treeify.load(run / "last"), tmp_path / "exported", tune=False)
    report = read(tmp_path / "exported", data=["name=digits", "held_out=1497"], latency=False)
    steps = rows(report, "steps")
    assert [row["to leaves"] for row in steps] == [1, 2, 4]
    sizes = [(tmp_path / "exported" / row["file"]).stat().st_size for row in steps]
    assert [row["bytes"] for row in steps] == sizes
    (exported,) = report.contents.results
    (result,) = read(run, latency=False, verify=False).contents.results
    assert exported.answers is not None
    assert result.answers is not None
    assert exported.answers.leaf_accuracy == approx(result.answers.leaf_accuracy, abs=0.2)
    assert "An export keeps nothing of the training" in report.html()


def test_several_say_whose_a_figure_is_and_that_data_differ(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(run, copy, symlinks=True)
    text = (copy / "recipe.yaml").read_text(encoding="utf-8")
    quick: Any = {"latency": False, "verify": False, "trust": True}
    report = read(run, run / "best", **quick)
    assert {"tree_tiny", "tree_tiny_best", "trade_off"} <= report.figures.keys()
    assert not any(section.warnings for section in report.sections)
    (copy / "recipe.yaml").write_text(_with_noise(text))
    report = read(run, copy, **quick)
    warnings = [section.warnings for section in report.sections if section.warnings]
    assert len(warnings) == 2
    assert "tiny: digits, other: runs:noise" in warnings[0][0]
    assert "accuracies do not compare" in report.html()


def _with_noise(recipe: str) -> str:
    values = yaml.safe_load(recipe)
    values["data"] = {"name": "runs:noise"}
    return yaml.safe_dump(values)


def test_a_run_without_metrics_says_so(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    (copy / "metrics.jsonl").unlink()
    report = read(copy, latency=False, verify=False)
    assert "loss" not in report.figures
    assert "trade_off" in report.figures
    assert "holds no epoch that can be read" in report.html()


def test_where_data_are_gone_the_last_epoch_speaks(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    values = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
    values["data"] = {"name": "image_folder", "root": str(tmp_path / "gone")}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(values))
    report = read(copy, latency=False, verify=False)
    assert "reliability" not in report.figures
    metrics = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    accuracies = [row["accuracy %"] for row in rows(report, "trade_off") if row["leaves"]]
    assert accuracies == [score["accuracy"] for score in metrics["held_out"]]
    (chart,) = (chart for chart in report.charts if chart.name == "trade_off")
    assert "not measured here" in chart.description


def test_what_cannot_be_reported_on_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to report on"):
        read()
    with pytest.raises(CheckpointError, match="holds no ensemble"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="beside"):
        read(run, beside="others")
    (tmp_path / "link").symlink_to(run)
    for again in (run, run / ".." / run.name, tmp_path / "link"):
        with pytest.raises(InputError, match="given twice"):
            read(run, again)


def test_files_are_written_whole_or_not_at_all(report: Report, tmp_path: Path) -> None:
    out = report.write(tmp_path / "a.html", title="Digits")
    assert "<title>Digits</title>" in out.read_text(encoding="utf-8")
    with pytest.raises(DataError, match="exists already"):
        report.write(out)
    report.write(out, overwrite=True)
    with pytest.raises(DataError, match="as its directory"):
        report.write(tmp_path / "no" / "a.html")
    with pytest.raises(DataError, match="a directory"):
        report.write(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.parametrize(
    ("format", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")]
)
def test_figures_are_written_by_themselves(
    report: Report, tmp_path: Path, format: str, start: bytes
) -> None:
    paths = report.write_figures(tmp_path / "figures", format)
    assert {path.stem for path in paths} == ALL
    assert all(path.read_bytes().startswith(start) for path in paths)
    before = {path: path.read_bytes() for path in paths}
    with pytest.raises(DataError, match="not empty"):
        report.write_figures(tmp_path / "figures", format)
    report.write_figures(tmp_path / "figures", format, overwrite=True)
    assert before == {path: path.read_bytes() for path in paths}  # the same every time
    with pytest.raises(InputError, match="gif"):
        report.write_figures(tmp_path / "others", "gif")
    first, *_, last = paths
    first.write_bytes(b"older")
    last.unlink()
    last.mkdir()
    with pytest.raises(DataError, match="is a directory"):
        report.write_figures(tmp_path / "figures", format, overwrite=True)
    assert first.read_bytes() == b"older"
    assert len(list((tmp_path / "figures").iterdir())) == len(paths)
    assert not (tmp_path / "others").exists()


def test_an_ensemble_and_its_modes_are_left_alone(run: Path) -> None:
    config = (run / "last" / "config.json").read_bytes()
    torch.manual_seed(3)
    read(run, latency=False)
    assert (run / "last" / "config.json").read_bytes() == config


def test_nothing_that_a_run_names_is_imported_without_trust(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    values = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
    values["loss"] = {"name": "no_such_module:loss"}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(values))
    report = read(copy, latency=False, verify=False)
    assert {"rates", "reliability"} <= report.figures.keys()
    values["data"] = {"name": "no_such_module:data"}
    values["schedule"] = {"name": "no_such_schedule", "epochs": 2}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(values))
    report = read(copy, latency=False, verify=False)
    assert not {"rates", "reliability"} & report.figures.keys()
    page = report.html()
    assert "would be imported" in page
    assert "learning rates do not follow" in page


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "recipe.yaml"])
def test_links_that_lead_out_of_a_run_are_not_followed(
    run: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    (copy / name).unlink()
    (copy / name).symlink_to(run / name)
    with pytest.raises(CheckpointError, match="leads out of"):
        read(copy)
    assert "loss" in read(copy, latency=False, verify=False, trust=True).figures
