"""Saving and loading: equal tensors and outputs, and a clear word about what cannot be loaded."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import small
import torch
from edited import edited

import treeify
from treeify import files
from treeify.conversion import checksums
from treeify.errors import CheckpointError
from treeify.training.state_file import TENSORS, write_state


def _named(**kwargs: object) -> treeify.HierarchicalEnsemble:
    return treeify.hierarchicalize(
        "small:build", ["stage1", "stage2:3"], example_input=small.EXAMPLE, **kwargs
    ).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    treeify.save(_named(), tmp_path / "hne")
    return tmp_path / "hne"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    hne = _named().to(dtype)
    hne.train()(small.images().to(dtype))  # running statistics and counters move
    treeify.save(hne.eval(), tmp_path / "hne")
    again = treeify.load(tmp_path / "hne", trust=True)
    state, other = hne.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    x = small.images().to(dtype)
    assert torch.equal(hne(x), again(x))
    assert again.tree == hne.tree
    assert sorted(path.name for path in (tmp_path / "hne").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_frozen_parameters_stay_frozen_and_the_others_free(tmp_path: Path) -> None:
    def frozen(hne: treeify.HierarchicalEnsemble) -> set[str]:
        return {key for key, own in hne.named_parameters() if not own.requires_grad}

    hne = _named()
    hne.get_submodule("stage1").requires_grad_(False)
    treeify.save(hne, tmp_path / "hne")
    base = small.build().requires_grad_(False)
    kept = frozen(treeify.load(tmp_path / "hne", trust=True))
    assert kept
    assert all(key.startswith("stage1.") for key in kept)
    assert kept == frozen(hne) == frozen(treeify.load(tmp_path / "hne", base))
    with edited(tmp_path / "hne" / "config.json") as config:
        del config["frozen"]  # as earlier versions saved it
    assert not frozen(treeify.load(tmp_path / "hne", trust=True))


@pytest.mark.parametrize("named", [True, False])
def test_numbers_that_no_state_dict_has_come_back(tmp_path: Path, named: bool) -> None:
    torch.manual_seed(3)
    model = "small:DrawnNet" if named else small.DrawnNet()
    hne = treeify.hierarchicalize(
        model, ["stage1"], init="fresh", seed=3, example_input=small.EXAMPLE
    )
    assert torch.equal(hne.leaf(0).shifts, hne.leaf(1).shifts) != named
    x = small.images()
    for _ in range(2):
        treeify.save(hne.eval(), tmp_path / "hne", overwrite=True)
        again = treeify.load(tmp_path / "hne", None if named else small.DrawnNet(), trust=named)
        assert torch.equal(again(x), hne(x))
        assert torch.equal(again.leaf(1)(x), hne.leaf(1)(x))
        assert again.architecture == hne.architecture
        hne = again


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_base_model_in_another_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small.SmallNet().to(dtype)
    hne = treeify.hierarchicalize(
        model, ["stage1"], init="fresh", example_input=small.EXAMPLE.to(dtype)
    ).eval()
    treeify.save(hne, tmp_path / "hne")
    x = small.images().to(dtype)
    assert torch.equal(treeify.load(tmp_path / "hne", model)(x), hne(x))


def test_files_may_be_read_by_whom_others_of_yours_may(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    treeify.save(_named(), tmp_path / "hne")
    write_state(tmp_path, {"step": torch.zeros(2)})
    for path in (*(tmp_path / "hne").iterdir(), tmp_path / TENSORS):
        assert path.stat().st_mode == ordinary.stat().st_mode, path


def test_a_loaded_ensemble_lives_apart_from_its_file(saved: Path) -> None:
    hne = treeify.load(saved, trust=True)
    before = hne(small.images())
    os.truncate(saved / "model.safetensors", 8)
    assert torch.equal(hne(small.images()), before)


def test_a_module_of_the_users_own_needs_its_model(tmp_path: Path) -> None:
    hne = small.ensemble()
    treeify.save(hne, tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"treeify.load\(path, model=...\)"):
        treeify.load(tmp_path / "own")
    again = treeify.load(tmp_path / "own", model=small.SmallNet())
    assert torch.equal(again(small.images()), hne(small.images()))
    with pytest.raises(CheckpointError, match="differs from the one that was saved"):
        treeify.load(tmp_path / "own", model=small.SmallNet(7))


def test_a_directory_that_is_not_empty(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    other = _named(init="fresh", seed=5)
    with pytest.raises(CheckpointError, match="not empty"):
        treeify.save(other, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    (saved / "notes.txt").write_text("mine")
    treeify.save(other, saved, overwrite=True)
    assert torch.equal(
        treeify.load(saved, trust=True)(small.images()), other.eval()(small.images())
    )
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("function", ["conversion.saving.save_file", "files.replace_text"])
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    first = _named()
    treeify.save(first, tmp_path / "there")
    before = sorted((tmp_path / "there").iterdir())
    monkeypatch.setattr(f"treeify.{function}", full)
    for name in ("there", "new"):
        with pytest.raises(CheckpointError, match="No space left"):
            treeify.save(_named(seed=5), tmp_path / name, overwrite=True)
    assert sorted((tmp_path / "there").iterdir()) == before
    assert torch.equal(
        treeify.load(tmp_path / "there", trust=True)(small.images()), first(small.images())
    )
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fails_when_all_is_written_leaves_the_new_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = files.replace_text

    def late(path: Path, text: str) -> None:
        original(path, text)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "replace_text", late)
    other = _named(init="perturb", seed=5)
    with pytest.raises(CheckpointError, match="Input/output error"):
        treeify.save(other, saved, overwrite=True)
    assert torch.equal(treeify.load(saved, trust=True)(small.images()), other(small.images()))


def test_damaged_directories(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        treeify.load(tmp_path / "nowhere")
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            treeify.load(saved, trust=True)
    weights.write_bytes(whole)
    (saved / "config.json").write_text((saved / "config.json").read_text()[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        treeify.load(saved, trust=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "found format 99|Found format 99"),
        ({"identity": "other"}, "different saves"),
        ({"splits": ["stage1:2", "stage2:2"]}, "do not match the configuration"),
        ({"splits": ["stage9:2"]}, "no longer converts as recorded"),
        ({"architecture": {"name": "small:build", "kwargs": {"classes": 7}}}, "differs from"),
        ({"architecture": {"name": "small:gone", "kwargs": {}}}, "no function 'gone'"),
    ],
)
def test_configurations_that_do_not_match(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    with edited(saved / "config.json") as config:
        config |= changes
    with pytest.raises(CheckpointError, match=message):
        treeify.load(saved, trust=True)


def test_weights_that_do_not_match(saved: Path) -> None:
    weights = saved / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    del state["head.bias"]
    with edited(saved / "config.json") as config:
        identity = {"identity": config["identity"]}
        safetensors.torch.save_file(state, weights, metadata=identity)
        config["files"][weights.name] = checksums.checksum(weights)
    with pytest.raises(CheckpointError, match=r"a tensor 'head.bias'"):
        treeify.load(saved, trust=True)


def test_a_run_says_where_its_ensemble_is(tmp_path: Path) -> None:
    ensemble = tmp_path / "run" / "checkpoints" / "step-1"
    treeify.save(small.ensemble(), ensemble / "ema")
    (tmp_path / "run" / "last").symlink_to("checkpoints/step-1")
    with pytest.raises(CheckpointError, match="It is a run; its last ensemble is") as raised:
        treeify.load(tmp_path / "run")
    assert str(ensemble / "ema") in str(raised.value)
