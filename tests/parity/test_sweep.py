"""Sweeps: every model gets its row, whatever happens to it or to the sweep."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_models
from hypothesis import given
from hypothesis import strategies as st
from rows import row

from treeify.errors import InputError
from treeify.parity import results
from treeify.parity.results import Coverage, Row
from treeify.parity.sweep import Settings, shard, sweep, todo

TESTS = Path(sweep_models.__file__).parent


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def swept(*functions: str, **settings: object) -> dict[str, Row]:
    names = [f"sweep_models:{function}" for function in functions]
    rows = list(sweep(names, Path("rows.jsonl"), Settings(**settings)))
    assert results.read(Path("rows.jsonl")).rows == tuple(rows)
    return dict(zip(functions, rows, strict=True))


def test_every_model_gets_a_row_whatever_happens_to_it() -> None:
    rows = swept("tiny", "raising", "killed", "hungry", "mapping", "changing", "another")
    for name in ("tiny", "another"):
        row = rows[name]
        assert row.proven
        assert row.how == "full"
        assert row.splits == ("second:2", "relu:2")
        assert row.fanouts == (2, 2)
        assert row.packed_fraction == 1
        assert row.input == (3, 64, 64)
        assert row.inner_split is None
        assert set(row.deviations) == {
            *("leaf_eval", "leaf_train", "buffers", "prefix", "gradient", "round_trip")
        }
        assert row.worst is not None
        assert row.worst <= 1
        assert row.parameters == sum(p.numel() for p in sweep_models.tiny().parameters())
        assert row.macs == 8 * 8 * (4 * 27 + 16 + 16) * (28 * 28) // (8 * 8) + 20
        assert row.seconds is not None
        assert row.peak_memory is not None
        assert row.peak_memory > 10**8
    assert "no weights today" in str(rows["raising"].failure)
    assert "out of memory: its process was ended by SIGKILL" in str(rows["killed"].failure)
    assert "out of memory: more than the 8 GB" in str(rows["mapping"].failure)
    assert rows["hungry"].converted
    assert rows["hungry"].how == "meta"
    assert rows["changing"].converted
    assert not rows["changing"].proven
    assert "ParityError: leaf_eval parity is off" in str(rows["changing"].failure)
    assert all(row.versions == results.versions() for row in rows.values())


def test_a_model_that_the_system_ends_for_its_memory_is_checked_shallower() -> None:
    row = swept("greedy")["greedy"]
    assert row.how == "reduced:depth=4"
    assert row.proven


def test_what_a_check_that_was_stopped_leaves_behind_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    assert swept("endless", time_limit=1.0)["endless"].failure
    assert Path(Path("endless.scratch").read_text(encoding="utf-8")).is_relative_to(tmp_path)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_model_that_takes_too_long_is_stopped() -> None:
    row = swept("endless", time_limit=1.0)["endless"]
    assert row.failure == "stopped after the time limit of 1 s"
    assert is_gone(int(Path("endless.pid").read_text(encoding="utf-8")))


def test_a_model_too_large_is_checked_without_weights() -> None:
    row = swept("wide", memory=2 * 10**9)["wide"]
    assert row.how == "meta"
    assert row.failure is None
    assert row.converted
    assert not row.proven
    assert row.deviations == {}
    assert row.estimate is not None
    assert row.estimate > 2 * 10**9
    assert row.least == row.estimate  # it has no blocks to leave out
    assert row.shortage == (
        f"checking numbers takes about {row.estimate / 1e9:.3g} GB; there were 2 GB"
    )
    assert row.peak_memory is not None
    assert row.peak_memory < row.estimate


def test_a_check_that_runs_out_of_memory_is_done_again_shallower() -> None:
    """This one's estimate is below what there is, and what its process takes is above."""
    row = swept("deep", memory=8 * 10**9)["deep"]
    assert row.how == "reduced:depth=4"
    assert row.arguments == {"depth": 4}
    assert row.proven
    assert row.splits == row.shallower_splits == ("second:2", "relu:2")
    assert row.packed_fraction == 1
    assert row.memory == 8 * 10**9
    assert row.estimate is not None
    assert row.estimate < 8 * 10**9
    assert row.least is None
    assert row.shortage is None


def test_the_export_of_what_passed_is_tried_and_stops_nothing() -> None:
    reasons = {
        "exported": "",
        "refused": "ValueError: a model of this kind cannot be exported",
    }
    for name, reason in reasons.items():
        rows = swept("tiny", "changing", export=getattr(sweep_models, name))
        Path("rows.jsonl").unlink()
        assert rows["tiny"].export == reason
        assert rows["tiny"].proven
        assert "round_trip" in rows["tiny"].deviations
        assert rows["tiny"].peak_memory is not None
        assert rows["changing"].export is None


def test_a_process_that_ends_in_an_export_has_passed_all_else() -> None:
    found = swept("nested", export=sweep_models.interrupted)["nested"]
    assert found.proven
    assert "inner_split" in found.deviations
    assert "SIGKILL" in str(found.export)


def test_nothing_is_exported_of_what_only_shapes_were_checked() -> None:
    found = swept("tiny", memory=1, export=sweep_models.refused)["tiny"]
    assert found.export == "only shapes were checked"
    assert not found.unfit


def test_models_are_checked_again_to_be_exported() -> None:
    rows = (
        row("before"),
        row("proven", export=""),
        row("unfit", export="no"),
        row("shapes", export="only shapes were checked", how="meta"),
        row("failed", failure="no"),
    )
    names = [own.name for own in rows]
    settings = Settings(export=sweep_models.exported)
    assert todo(names, Coverage(rows), settings) == ["before"]
    assert todo(names, Coverage(rows), settings, retry=True) == ["before", "unfit", "failed"]
    assert todo(names, Coverage(rows), Settings(), retry=True) == ["failed"]


def is_gone(process: int, seconds: float = 10) -> bool:
    """Whether a process ends within some seconds (zombies have ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stat = Path(f"/proc/{process}/stat")
        if (
            not stat.exists()
            or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
        ):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=lambda end: end.name)
def test_an_ended_sweep_leaves_no_process_and_goes_on_where_it_stopped(
    end: signal.Signals,
) -> None:
    names = ["sweep_models:tiny", "sweep_models:endless", "sweep_models:another"]
    program = (
        "from pathlib import Path\nfrom treeify.parity.sweep import Settings, sweep\n"
        f"if __name__ == '__main__':\n  list(sweep({names!r}, Path('rows.jsonl'), Settings()))\n"
    )
    Path("program.py").write_text(program, encoding="utf-8")
    path = os.pathsep.join([str(TESTS), *sys.path])  # where `sweep_models` is
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,  # Ctrl-C prints where it came
    )
    pid = Path("endless.pid")
    while not (pid.exists() and pid.read_text(encoding="utf-8")):
        assert process.poll() is None, "the sweep ended by itself"
        time.sleep(0.05)
    process.send_signal(end)
    process.wait(10)
    assert is_gone(int(pid.read_text(encoding="utf-8")))
    known = results.read(Path("rows.jsonl"))
    assert [row.name for row in known.rows] == names[:1]
    assert todo(names, known, Settings()) == names[1:]
    list(sweep(names[2:], Path("rows.jsonl"), Settings()))
    assert todo(names, results.read(Path("rows.jsonl")), Settings()) == names[1:2]


def test_the_last_line_of_a_model_counts_and_versions_and_splits_are_told_apart() -> None:
    file = Path("rows.jsonl")
    other = {**results.versions(), "timm": "0.1"}
    for own in (
        row("a", failure="no"),
        row("b", failure="no"),
        Row(name="c", versions=other, asked="2"),
        Row(name="d", versions=results.versions(), asked="4"),
        row("a"),
    ):
        results.append(file, own)
    known = results.read(file)
    assert [own.name for own in known.rows] == ["b", "c", "d", "a"]
    assert todo(["a", "b", "c", "d", "e"], known, Settings()) == ["c", "d", "e"]
    assert todo(["a", "b", "c", "d", "e"], known, Settings(), retry=True) == ["b", "c", "d", "e"]
    assert todo(["a", "b", "c", "d", "e"], known, Settings("4")) == ["a", "b", "c", "e"]
    assert todo(["a", "d"], Coverage(()), Settings()) == ["a", "d"]


def test_more_memory_checks_those_again_that_were_not_checked_in_full() -> None:
    rows = (
        row("full", how="full", memory=4),
        row("shallower", how="reduced:blocks=1", memory=4),
        row("shapes", how="meta", memory=4),
        row("failed", how="meta", memory=4, failure="no"),
    )
    names = [own.name for own in rows]
    assert todo(names, Coverage(rows), Settings(memory=4)) == []
    assert todo(names, Coverage(rows), Settings(memory=5)) == ["shallower", "shapes"]


@given(st.lists(st.text(max_size=3), unique=True, max_size=40), st.integers(1, 12))
def test_shards_part_the_names_evenly(names: list[str], parts: int) -> None:
    shards = [shard(names, part, parts) for part in range(1, parts + 1)]
    assert sorted(name for part in shards for name in part) == sorted(names)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(part == sorted(part, key=names.index) for part in shards)


@pytest.mark.parametrize(("part", "parts"), [(0, 3), (4, 3), (1, 0)])
def test_a_shard_that_is_none_is_refused(part: int, parts: int) -> None:
    with pytest.raises(InputError, match="there is no shard"):
        shard(["a"], part, parts)
