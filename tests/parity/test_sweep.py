"""Sweeps: every model gets its row, whatever happens to it or to the sweep."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import sweep_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import treeify
from treeify.errors import InputError, ModelError, ParityError
from treeify.models.architecture import Architecture
from treeify.models.builders import check_names, family, library_names
from treeify.parity import results
from treeify.parity.check_levels import CheckLevel, check_levels, estimated_bytes
from treeify.parity.checks import check_shapes
from treeify.parity.fresh_weights import fit_statistics
from treeify.parity.results import Coverage, Row
from treeify.parity.sweep import Settings, shard, sweep, todo
from treeify.parity.verify import verify_outputs
from treeify.parity.zoo_check import round_trip, verify_model

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


@pytest.mark.parametrize("memory", [8 * 10**9, 1], ids=["full", "meta"])
def test_a_model_is_split_inside_a_module_too(memory: int) -> None:
    row: dict[str, Any] = {}
    verify_model("sweep_models:nested", "1", memory, row.update)
    assert row["inner_split"] == "stage.1"
    assert row["how"] == ("meta" if memory == 1 else "full")
    assert ("inner_split" in row.get("deviations", {})) == (memory > 1)


def test_a_mistake_of_the_split_inside_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = treeify.HierarchicalEnsemble.run

    def broken(hne: treeify.HierarchicalEnsemble, *args: Any) -> Any:
        inside = any("." in name for name in hne.conversion.splits.names)
        return run(hne, *args) + inside

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    row: dict[str, Any] = {}
    with pytest.raises(ParityError):
        verify_model("sweep_models:nested", "1", 8 * 10**9, row.update)
    assert set(row["deviations"]) >= {"gradient", "round_trip"}


def test_splits_that_only_the_whole_model_has_are_checked_without_weights() -> None:
    row: dict[str, Any] = {}
    level = next(check_levels("vit_tiny_patch16_224", 2, 2**40))
    verify_model("vit_tiny_patch16_224", "blocks.8", level.estimate - 1, row.update)
    assert row["how"] == "meta"
    assert row["splits"] == ("blocks.8:2",)
    assert "deviations" not in row


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


def row(name: str, **fields: object) -> Row:
    return Row(name=name, versions=results.versions(), asked="2", **fields)


def test_what_only_shapes_were_checked_of_says_why() -> None:
    needs = {"how": "meta", "estimate": 40 * 10**9, "least": 9 * 10**9}
    start = "checking numbers takes about 40 GB, with as few blocks as it runs with 9 GB; "
    assert row("a", memory=8 * 10**9, **needs).shortage == f"{start}there were 8 GB"
    assert row("a", memory=10**10, **needs).shortage == f"{start}it ran out of 10 GB"


def test_a_file_cut_off_anywhere_loses_no_other_line() -> None:
    file = Path("rows.jsonl")
    results.append(file, row("a", packed_fraction=0.5))
    whole = file.read_bytes()
    results.append(file, row("b"))
    both = file.read_bytes()
    for length in range(len(whole), len(both) + 1):
        file.write_bytes(both[:length])
        results.append(file, row("c"))
        found = results.read(file)
        names = [own.name for own in found.rows]
        if length in (len(whole), len(both), len(both) - 1):
            complete = length >= len(both) - 1
            assert names == (["a", "b", "c"] if complete else ["a", "c"])
            assert found.damaged == 0
        else:
            assert names == ["a", "c"]
            assert found.damaged == 1


def test_a_row_is_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    file, bring = tmp_path / "rows.jsonl", os.fsync

    def fsync(descriptor: int) -> None:
        bring(descriptor)
        seen.append(file.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    results.append(file, Row(name="a", versions={}, asked="2"))
    assert seen == [file.read_text()]
    assert seen[0].endswith("\n")


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


@pytest.mark.parametrize("text", ['{"name": 3}', "[]", '{"name": "a", "versions": {}, "x": 1}'])
def test_a_file_of_something_else_is_refused(text: str) -> None:
    Path("other.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(treeify.errors.DataError, match=r"other.jsonl:1 is no row"):
        results.read(Path("other.jsonl"))


def test_compressed_rows_read_the_same() -> None:
    rows = (row("a", packed_fraction=1 / 3, deviations={"prefix": 0.1}), row("b", failure="é"))
    file = Path("rows.jsonl.xz")
    file.write_bytes(results.compressed(reversed(rows)))
    assert results.read(file).rows == rows


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


def first_level(name: str, leaves: int, memory: int) -> CheckLevel:
    return next(check_levels(name, leaves, memory))


def test_the_memory_decides_how_a_model_is_checked() -> None:
    name = "vit_tiny_patch16_224"
    full = first_level(name, 4, 2**40)
    assert full.how == "full"
    assert full.shape == (3, 64, 64)
    assert full.architecture == Architecture(name, {"num_classes": 10, "img_size": 64})
    reduced = first_level(name, 4, full.estimate - 1)
    assert reduced.how == "reduced:blocks=4"
    assert len(reduced.architecture.build().blocks) == 4  # type: ignore[arg-type]
    assert reduced.estimate == full.estimate
    fewer = ["full", "reduced:blocks=4", "reduced:blocks=2", "reduced:blocks=1", "meta"]
    assert [level.how for level in check_levels(name, 4, full.estimate)] == fewer
    shallowest = first_level(name, 4, estimated_bytes(nn.Linear(1000, 1000, bias=False), 4))
    assert shallowest.how == "reduced:blocks=1"
    meta = first_level(name, 4, 1)
    assert meta.how == "meta"
    assert meta.architecture == Architecture(name)
    assert meta.shape == (3, 224, 224)
    one_block = Architecture(name, {"num_classes": 10, "img_size": 64, "depth": 1}).build()
    assert full.least is None
    assert meta.estimate == full.estimate
    assert meta.least == estimated_bytes(one_block, 4)
    assert estimated_bytes(nn.Identity(), 4) < full.estimate < first_level(name, 16, 2**40).estimate


def test_batch_norms_need_more_memory() -> None:
    """Under them float32 is too coarse, and the check ends up in float64."""
    layers = [nn.Linear(1000, 1000) for _ in range(10)]
    nothing, without = estimated_bytes(nn.Identity(), 4), estimated_bytes(nn.Sequential(*layers), 4)
    normed = estimated_bytes(nn.Sequential(*layers, nn.BatchNorm1d(1000)), 4)
    assert 1.7 < (normed - nothing) / (without - nothing) < 2


def test_batch_norms_average_more_than_two_numbers() -> None:
    """At 96 pixels, which it takes, the last maps of this one are a single pixel."""
    assert first_level("inception_v3", 4, 2**40).shape == (3, 128, 128)
    # The norm in its head has two at every size; at 64 pixels those of its last stage have as few.
    assert first_level("shvit_s2", 4, 2**40).shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("name", "blocks", "how"),
    [
        ("resnet18", "layers", "layers=[1, 1, 1, 1]"),
        ("swin_tiny_patch4_window7_224", "depths", "blocks=1"),
    ],
)
def test_a_shallower_model_keeps_its_stages(name: str, blocks: str, how: str) -> None:
    """With three stages the one can be built and does not run, the other does."""

    def memory(stages: int) -> int:
        made = Architecture(name, {"num_classes": 10, blocks: [1] * stages}).build()
        return estimated_bytes(made, 4)

    assert first_level(name, 4, memory(4)).how == f"reduced:{how}"
    assert first_level(name, 4, memory(3)).how == "meta"


def test_the_library_names_are_all_there_and_have_a_family() -> None:
    names = library_names()
    assert len(names) == len(set(names))
    assert {"resnet18", "torchvision/resnet18"} <= set(names)
    assert family("resnet18") == "resnet"
    assert family("torchvision/resnet18") == "torchvision/resnet"
    assert all(map(family, names))


def test_wrong_names_are_refused_together_with_the_nearest_right_ones() -> None:
    check_names(["resnet18", "torchvision/resnet18", "timm/resnet18", "sweep_models:tiny"])
    with pytest.raises(
        ModelError, match=r"(?s)2 names.*resnet1O.*'resnet18'.*5O.*'torchvision/resnet50'"
    ):
        check_names(["resnet1O", "resnet18", "torchvision/resnet5O"])


def tiny() -> treeify.HierarchicalEnsemble:
    return treeify.hierarchicalize(
        Architecture("sweep_models:tiny"), 2, example_input=torch.zeros(1, 3, 16, 16)
    )


def test_a_round_trip_that_loses_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = tiny(), torch.rand(2, 3, 16, 16)
    hne.train()
    assert round_trip(hne, x) == 0
    assert hne.training

    original = treeify.load

    def load(path: str) -> treeify.HierarchicalEnsemble:
        loaded = original(path)
        with torch.no_grad():
            loaded.head.bias += 1
        return loaded

    monkeypatch.setattr("treeify.parity.zoo_check.checkpoint.load", load)
    with pytest.raises(ParityError, match=r"1 tensors changed .* head.bias"):
        round_trip(hne, x)


def test_a_round_trip_with_other_logits_from_the_same_tensors_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hne, x = tiny(), torch.rand(2, 3, 16, 16)
    original = treeify.load

    def load(path: str) -> treeify.HierarchicalEnsemble:
        loaded = original(path)
        loaded.register_forward_hook(lambda module, inputs, output: output + 1)
        return loaded

    monkeypatch.setattr("treeify.parity.zoo_check.checkpoint.load", load)
    with pytest.raises(ParityError, match="logits after save and load are off"):
        round_trip(hne, x)


def test_wrong_shapes_are_noticed() -> None:
    hne, x = tiny().to("meta"), torch.rand(2, 3, 16, 16, device="meta")
    check_shapes(hne, x)
    hne.run = lambda *args: torch.empty(2, 4, 6, device="meta")  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="another shape"):
        check_shapes(hne, x)
    hne.run = lambda *args: torch.empty(2, 5, 5, device="meta")  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="does not have"):
        check_shapes(hne, x)


@pytest.mark.parametrize(("device", "check"), [("meta", check_shapes), ("cpu", verify_outputs)])
def test_a_leaf_whose_tensors_are_held_otherwise_is_noticed(
    device: str, check: Callable[..., object]
) -> None:
    hne, x = tiny().to(device), torch.rand(2, 3, 16, 16, device=device)
    run = hne.run
    hne.run = lambda *args: {"logits": run(*args)}  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="in another structure"):
        check(hne, x)


def test_the_rows_that_ship_have_the_macs_of_every_model() -> None:
    rows = results.shipped().newest().values()
    assert [row.name for row in rows if row.converted and not row.macs] == []


def test_macs_are_counted_where_a_view_of_a_parameter_goes_into_a_layer() -> None:
    told: dict[str, object] = {}
    verify_model("test_vit3", "1", 8 * 10**9, told.update)
    assert told["macs"] is not None


def test_batch_norms_are_checked_with_statistics_near_those_of_the_images() -> None:
    hne = small.ensemble(["stem:3"])
    norms = [own for own in hne.modules() if isinstance(own, torch.nn.BatchNorm2d)]
    torch.manual_seed(0)
    images = small.images(64)
    fit_statistics(hne, images)
    assert [own.momentum for own in norms] == [0.1, 0.1]
    assert not hne.training
    leaf = hne.leaf(0)
    x, norm = leaf.stem[0](images), leaf.stem[1]
    near = norm.running_var / x.var((0, 2, 3))
    apart = (norm.running_mean - x.mean((0, 2, 3))) / x.std((0, 2, 3))
    assert near.min() > 0.75
    assert near.max() < 1.35
    assert apart.abs().max() < 0.5
    assert min(near.std(), apart.std()) > 0.02  # near, and not the very same
    assert not torch.equal(hne.leaf(0).stage1[1].running_mean, hne.leaf(1).stage1[1].running_mean)
