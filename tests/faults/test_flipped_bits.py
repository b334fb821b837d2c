"""A bit that flips in any file of an ensemble or of a run's state is noticed, wherever it is."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import small
import torch
from edited import edited

import treeify
from treeify.conversion import checksums
from treeify.conversion.saved_config import check_files
from treeify.errors import CheckpointError
from treeify.training.run_directory import RunDirectory
from treeify.training.run_lock import locked
from treeify.training.state_file import read_state
from treeify.training.trainer import train


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "hne"
    hne = small.ensemble()
    hne.calibrate(small.images(), repeats=2)
    treeify.save(hne, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average, and two states."""
    path = tmp_path_factory.mktemp("trained")
    train(runs.recipe(path, "schedule.epochs=2", "checkpoints.keep=2"), out=path / "run")
    return path / "run"


def flips(size: int, count: int = 60) -> Iterator[tuple[int, int]]:
    """Positions and bits: of the first and the last bytes, and spread over all."""
    spread = range(0, size, max(1, size // count))
    for at in sorted({*range(min(size, 24)), *range(max(0, size - 24), size), *spread}):
        yield at, at % 8


def unnoticed(
    file: Path, check: Callable[[], object], *, every: bool = False
) -> list[tuple[int, int]]:
    """The flips in a file that a check does not refuse; the file is as it was afterwards."""
    whole = file.read_bytes()
    each = flips(len(whole))
    if every:
        each = ((at, bit) for at in range(len(whole)) for bit in range(8))
    passed = []
    for at, bit in each:
        content = bytearray(whole)
        content[at] ^= 1 << bit
        file.write_bytes(content)
        try:
            check()
        except CheckpointError:
            continue
        passed.append((at, bit))
    file.write_bytes(whole)
    check()
    return passed


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_of_an_ensemble(ensemble: Path, name: str) -> None:
    assert not unnoticed(ensemble / name, lambda: check_files(ensemble))
    file = ensemble / name
    whole = file.read_bytes()
    for at, bit in [(9, 0), (len(whole) // 2, 3), (len(whole) - 5, 1)]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged(.|\n)*verify=False"):
            treeify.load(ensemble, small.SmallNet())
    file.write_bytes(whole)
    assert treeify.load(ensemble, small.SmallNet()).latencies


def test_every_bit_of_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    values = {"format": 1, "seconds": [1e-05, 2.5], "name": "caf\u00e9", "files": {"a": "b"}}
    file.write_text(checksums.seal(values))
    read = checksums.read_sealed(file, 2**20)
    assert {key: read[key] for key in values} == values
    assert not unnoticed(file, lambda: checksums.read_sealed(file, 2**20), every=True)


def test_of_a_state(run: Path) -> None:
    newest = (run / "last").resolve()
    names = sorted(path.relative_to(newest) for path in newest.rglob("*.*"))
    assert [str(name) for name in names] == [
        "config.json",
        "ema/config.json",
        "ema/model.safetensors",
        "model.safetensors",
        "trainer.json",
        "trainer.safetensors",
    ]

    def check() -> None:
        check_files(newest)
        check_files(newest / "ema")
        read_state(newest)

    for name in names:
        assert not unnoticed(newest / name, check), name


def newest_of(path: Path, warn: Callable[[str], Any]) -> Path | None:
    with locked(path, warn) as lock:
        return RunDirectory(path, lock).newest(warn)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _other(file: Path) -> None:
    """A whole file of another state in its place."""
    (before,) = (path for path in file.parents[1].glob("step-*") if path != file.parent)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(before / name, file.parent / name)


def _dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES = {
    "weights": ("model.safetensors", _flip),
    "average": ("ema/model.safetensors", _flip),
    "settings": ("ema/config.json", _flip),
    "values": ("trainer.json", _flip),
    "tensors": ("trainer.safetensors", _flip),
    "no average": ("ema", shutil.rmtree),
    "no weights": ("ema/model.safetensors", Path.unlink),
    "no settings": ("config.json", Path.unlink),
    "another's": ("model.safetensors", _other),
    "link": ("model.safetensors", _dangling),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_the_state_before_a_damaged_one_is_taken(
    run: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    before, newest = sorted((copy / "checkpoints").iterdir())[-2:]
    damage(newest / name)
    warned: list[str] = []
    assert newest_of(copy, warned.append) == before
    assert str(newest) in warned[0]
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    assert (copy / "last").resolve() == before


def test_a_link_that_names_nothing_is_put_right(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    newest = (copy / "last").resolve()
    (copy / "last").unlink()
    (copy / "last").symlink_to("checkpoints/step-00000000-epoch-0000")
    with pytest.raises(CheckpointError, match="no such directory"):
        treeify.load(copy / "last")
    assert newest_of(copy, pytest.fail) == newest
    assert (copy / "last").resolve() == newest


def test_a_state_of_an_earlier_version_without_its_average_is_damaged(
    run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    before, newest = sorted((copy / "checkpoints").iterdir())[-2:]
    for state in (before, newest):
        for file in ("config.json", "ema/config.json", "trainer.json"):
            with edited(state / file) as values:
                del values["files"], values["checksum"]
    shutil.rmtree(newest / "ema")
    assert newest_of(copy, lambda text: None) == before


def test_what_was_changed_on_purpose_is_loaded_without_looking(
    ensemble: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(ensemble, tmp_path / "hne")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"latencies": []}))
    with pytest.raises(CheckpointError, match="verify=False"):
        treeify.load(copy, small.SmallNet())
    hne = treeify.load(copy, small.SmallNet(), verify=False)
    assert not hne.latencies
    treeify.save(hne, copy, overwrite=True)
    assert torch.equal(treeify.load(copy, small.SmallNet())(small.images()), hne(small.images()))


@pytest.mark.parametrize(
    "named",
    [{}, [], {"../model.safetensors": "0"}, {"model.safetensors": 1}, {"a": "b", "c": "d"}, None],
)
def test_weights_are_in_the_directory_under_their_name(
    ensemble: Path, tmp_path: Path, named: object
) -> None:
    copy = shutil.copytree(ensemble, tmp_path / "hne")
    with edited(copy / "config.json") as config:
        config["files"] = named
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="does not name the weights"):
            treeify.load(copy, small.SmallNet(), verify=verify)
