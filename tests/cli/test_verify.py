"""`treeify verify`: what it says, what it skips and when it fails."""

from pathlib import Path

import pytest
from runner import run

from treeify.parity import results
from treeify.parity.results import Row

TINY, OTHER = "sweep_models:tiny", "sweep_models:another"


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(name: str, **fields: object) -> None:
    row = Row(name=name, versions=results.versions(), asked="2", **fields)
    results.append(Path("coverage.jsonl"), row)


def test_models_pass_once_and_are_skipped_then() -> None:
    result = run("verify", TINY, OTHER, TINY)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"1/2 {TINY}: proven (full), off by ")
    assert "of the tolerance, 100.0% of MACs packed (" in lines[0]
    assert lines[1].startswith(f"2/2 {OTHER}: proven (full)")
    assert lines[2] == "All 2 passed. Rows: coverage.jsonl"
    before = Path("coverage.jsonl").read_bytes()

    result = run("verify", TINY, OTHER)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "2 of 2 are in coverage.jsonl already."
    assert Path("coverage.jsonl").read_bytes() == before


def test_what_only_shapes_were_checked_of_has_not_passed() -> None:
    result = run("verify", TINY, OTHER, "--memory", "1")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    text = f"All 2 converted, 0 proven; only shapes were checked of {TINY}, {OTHER}."
    assert last == f"{text} Rows: coverage.jsonl"


def test_a_failure_is_exit_code_1_now_and_later_until_it_is_retried() -> None:
    written(TINY, failure="a bug that is gone")
    result = run("verify", TINY, "sweep_models:raising")
    assert result.exit_code == 1
    assert "1 of 2 are in coverage.jsonl already." in result.stdout
    assert "1/1 sweep_models:raising: FAILED (not built): ModelError: " in result.stdout
    assert f"2 of 2 failed: {TINY}, sweep_models:raising" in result.stdout

    assert run("verify", TINY).exit_code == 1
    assert run("verify", TINY, "--retry").exit_code == 0
    assert run("verify", TINY).exit_code == 0


def test_an_export_is_tried_where_it_is_asked_for() -> None:
    written(TINY, how="full", packed_fraction=1.0, deviations={"prefix": 0.1})
    result = run("verify", TINY, "--export")
    assert result.exit_code == 0, result.output
    assert ", exported (" in result.stdout
    (row,) = results.read(Path("coverage.jsonl")).rows
    assert row.export == ""


def test_a_model_that_cannot_be_exported_fails_where_that_was_asked() -> None:
    written(TINY, how="full", packed_fraction=1.0, deviations={"prefix": 0.1}, export="no")
    result = run("verify", TINY, "--export")
    assert result.exit_code == 1
    assert f"1 of 1 failed: {TINY}" in result.stdout
    assert run("verify", TINY).exit_code == 0


def test_without_what_exports_need_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.deploy.directory.find_spec", lambda name: None)
    monkeypatch.delattr("treeify.cli.verify.sweep")
    result = run("verify", TINY, "--export")
    assert result.exit_code == 2
    assert "pip install 'treeify[onnx]'" in result.stderr


def test_splits_can_be_named_and_a_shard_taken() -> None:
    result = run(
        *("verify", TINY, OTHER, "--shard", "2/2", "--splits", "second:3", "--output", "own.jsonl")
    )
    assert result.exit_code == 0, result.output
    (row,) = results.read(Path("own.jsonl")).rows
    assert (row.name, row.splits, row.fanouts) == (OTHER, ("second:3",), (3,))


def test_a_shard_without_models_says_so() -> None:
    result = run("verify", TINY, "--shard", "2/2")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Shard 2/2 has no models: there are fewer of them than shards.\n"
    assert not Path("coverage.jsonl").exists()


def test_rows_of_other_versions_prove_nothing() -> None:
    versions = {**results.versions(), "timm": "0.1"}
    numbers = {"how": "full", "packed_fraction": 1.0, "deviations": {"prefix": 0.1}}
    results.append(Path("coverage.jsonl"), Row(name=TINY, versions=versions, asked="2", **numbers))
    written(TINY, how="meta", packed_fraction=1.0)
    result = run("verify", TINY)
    assert "All 1 converted, 0 proven; only shapes were checked of" in result.stdout


def test_a_line_that_was_cut_off_is_told() -> None:
    written(TINY)
    with Path("coverage.jsonl").open("a") as file:
        file.write('{"name":"resn')
    result = run("verify", TINY)
    assert result.exit_code == 0, result.output
    assert "Lines of coverage.jsonl that were cut off, and are ignored: 1" in result.stdout


def test_all_is_every_name_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.cli.verify.library_names", lambda: ["a", "b", "c"])
    for name in "abc":
        written(name)
    result = run("verify", "--all", "--shard", "1/2")
    assert result.exit_code == 0, result.output
    assert "2 of 2 are in coverage.jsonl already." in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model was named."),
        (["resnet18", "--all"], "--all and names were both given."),
        (["resnet1O", TINY], "there is no model 'resnet1O'"),
        (["sweep_models:tinny"], "has no function 'tinny'"),
        ([TINY, "--splits", "second:two"], "has a fanout that is not a number"),
        ([TINY, "--splits", "second:1"], "a split needs at least two children"),
        ([TINY, "--splits", "-1"], "is not a number of splits"),
        ([TINY, "--shard", "3"], "--shard '3' is no shard."),
        ([TINY, "--shard", "3/2"], "there is no shard 3/2."),
        ([TINY, "--memory", "much"], "--memory 'much' is no whole number"),
        ([TINY, "--time-limit", "long"], "--time-limit 'long' is no duration"),
        ([TINY, "--output", "rows.jsonl.xz"], "rows are appended to plain text"),
        ([TINY, "--output", "no/such/rows.jsonl"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.delattr("treeify.cli.verify.sweep")
    result = run("verify", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("coverage.jsonl").exists()
