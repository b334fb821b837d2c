"""A push is one commit of files that were checked here; a failure leaves nothing half-done."""

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import torch
import yaml

import treeify
from treeify.deploy.exported import ExportedEnsemble
from treeify.errors import CheckpointError, InputError, LeafError, TreeifyError

NAME = "hf-hub:org/name"


def digests(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha1(path.read_bytes()).hexdigest() for path in paths}


def same(one: treeify.HierarchicalEnsemble, other: treeify.HierarchicalEnsemble) -> bool:
    x = torch.rand(2, *one.example)
    return torch.equal(one(x), other(x))


@pytest.mark.usefixtures("logged_in")
def test_what_is_pushed_is_loaded(trained: Path, hub: fake_hub.Hub) -> None:
    before = digests(trained)
    pushed = treeify.push(trained, "org/name", private=True)
    repo = hub.repos["org/name"]
    assert repo.private
    assert repo.messages == ["made by the test", "Pushed by treeify"]
    assert pushed.commit == repo.branches["main"]
    assert pushed.url == f"{hub.address}/org/name/commit/{pushed.commit}"
    assert {str(path) for path in pushed.files} == repo.files.keys() - {".gitattributes"}
    assert same(treeify.load(NAME), treeify.load(trained / "last"))
    assert digests(trained) == before


@pytest.mark.usefixtures("logged_in")
def test_a_second_push_replaces_the_first(
    trained: Path, converted: Path, hub: fake_hub.Hub, tmp_path: Path
) -> None:
    treeify.push(trained, "org/name")
    repo = hub.repos["org/name"]
    files = {**repo.files, "model-" + 32 * "0" + ".safetensors": b"old", "LICENSE": b"mine"}
    repo.commit(files, "by hand")
    treeify.push(converted, "org/name")
    assert not [name for name in repo.files if name.startswith("model-")]
    assert "trade_off.png" not in repo.files
    assert repo.files["LICENSE"] == b"mine"
    assert same(treeify.load(NAME), treeify.load(converted))


@pytest.mark.usefixtures("logged_in")
def test_models_of_others_are_not_overwritten(converted: Path, hub: fake_hub.Hub) -> None:
    files = {"config.json": b'{"model_type": "bert"}', "README.md": b"mine"}
    repo = hub.add("org/bert", files)
    with pytest.raises(InputError, match="holds a model of another library"):
        treeify.push(converted, "org/bert")
    assert repo.files == files
    treeify.push(converted, "org/bert", create_pr=True)
    assert repo.files == files
    hub.add("org/leaf", {"config.json": b'{"architecture": "resnet18"}'})
    treeify.push(converted, "org/leaf", as_timm=0)
    assert b"test_resnet" in hub.repos["org/leaf"].files["config.json"]


@pytest.mark.usefixtures("logged_in")
def test_branches_and_pull_requests(converted: Path, hub: fake_hub.Hub) -> None:
    treeify.push(converted, "org/name", revision="next")
    repo = hub.repos["org/name"]
    assert "config.json" not in repo.files
    assert treeify.load(f"{NAME}@next").leaves == 2
    pushed = treeify.push(converted, "org/name", create_pr=True)
    assert pushed.url == f"{hub.address}/org/name/discussions/1"
    assert "config.json" not in repo.files
    (branch,) = repo.branches.keys() - {"main", "next"}
    assert treeify.load(f"{NAME}@{branch}").leaves == 2


def test_a_dry_run_asks_the_hub_for_nothing(
    trained: Path, hub: fake_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pushed = treeify.push(trained, "org/name", dry_run=True)
    assert hub.requests == []
    assert (pushed.url, pushed.commit, pushed.folder) == (None, None, Path("pushed/name"))
    assert same(treeify.load("pushed/name"), treeify.load(trained / "last"))
    assert {str(path) for path in pushed.files} == {
        "README.md",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.yaml",
        "trade_off.png",
    }


def test_an_export_and_a_report_go_with_it(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    treeify.push(trained, "org/name", extras=["report", "export"], dry_run=True, out=out)
    hne = treeify.load(out)
    x = torch.rand(2, *hne.example)
    assert torch.allclose(ExportedEnsemble(out / "export").predict(x), hne.predict(x), atol=1e-4)
    page = (out / "report.html").read_text()
    assert "<svg" in page
    card = (out / "README.md").read_text()
    assert "`export`: the same answers" in card
    assert "`report.html`: figures" in card
    assert str(trained) not in page + card


def test_places_of_this_machine_stay_here(trained: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    run = tmp_path / "private" / "run"
    shutil.copytree(trained, run, symlinks=True)
    recipe["out"] = str(run)
    recipe["teacher"] = {"name": "/home/me/secret/teacher"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    treeify.push(run, "org/name", extras=["report"], dry_run=True, out=out)
    shared = "".join(
        path.read_text() for path in out.iterdir() if path.suffix not in (".safetensors", ".png")
    )
    for place in ("/home/me/secret", str(tmp_path), "private"):
        assert place not in shared
    assert yaml.safe_load((out / "recipe.yaml").read_text())["teacher"] == {"name": "teacher"}


def test_the_best_state_has_its_own_numbers(trained: Path, tmp_path: Path) -> None:
    pushed = treeify.push(trained / "best", "org/name", dry_run=True, out=tmp_path / "out")
    assert Path("recipe.yaml") in pushed.files
    assert "Measured on this ensemble" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.usefixtures("logged_in")
def test_an_ensemble_of_the_hub_is_pushed_again(converted: Path, hub: fake_hub.Hub) -> None:
    hub.add("org/name", {path.name: path.read_bytes() for path in converted.iterdir()})
    treeify.push(NAME, "other/copy")
    assert same(treeify.load("hf-hub:other/copy"), treeify.load(converted))


@pytest.mark.parametrize("broken", ["preupload", "commit", "repos/create"])
def test_a_failure_in_the_middle_changes_nothing(
    broken: str, converted: Path, hub: fake_hub.Hub, logged_in: None
) -> None:
    repo = hub.add("org/name", {"README.md": b"as it was"})
    before, sha = dict(repo.files), repo.branches["main"]
    hub.broken = broken
    with pytest.raises(
        InputError, match=r"org/name cannot be written to[\s\S]*broke down[\s\S]*Noth"
    ):
        treeify.push(converted, "org/name")
    assert (repo.files, repo.branches["main"]) == (before, sha)


@pytest.mark.usefixtures("logged_in")
def test_a_card_that_the_hub_refuses(converted: Path, hub: fake_hub.Hub) -> None:
    hub.broken = "validate-yaml"
    with pytest.raises(InputError, match=r"is not taken as it is[\s\S]*Correct the licence"):
        treeify.push(converted, "org/name", licence="my own")
    assert hub.repos["org/name"].files.keys() == {".gitattributes"}


def test_nobody_is_logged_in(converted: Path, hub: fake_hub.Hub) -> None:
    with pytest.raises(
        InputError, match=r"nobody is logged in[\s\S]*hf auth login[\s\S]*--dry-run"
    ):
        treeify.push(converted, "org/name")
    assert hub.requests == []


def test_a_wrong_token(converted: Path, hub: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"not open to you[\s\S]*may write there[\s\S]*Found 401"):
        treeify.push(converted, "org/name")
    assert hub.repos == {}


def test_without_a_network(
    converted: Path, hub: fake_hub.Hub, logged_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(InputError, match=r"cannot be written to[\s\S]*Nothing was committed"):
        treeify.push(converted, "org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be written to[\s\S]*Nothing was committed"):
        treeify.push(converted, "org/name")


@pytest.mark.parametrize(
    ("repository", "options", "error", "message"),
    [
        ("name", {}, InputError, "Expected org/name"),
        ("org/../name", {}, InputError, "Expected org/name"),
        (None, {}, InputError, "Expected org/name"),
        ("org/name", {"extras": ["exprt"]}, InputError, "did you mean 'export'"),
        ("org/name", {"extras": "export"}, InputError, "extras"),
        ("org/name", {"as_timm": 0, "extras": ["report"]}, InputError, "goes alone"),
        ("org/name", {"as_timm": True}, InputError, "as_timm is no integer"),
        ("org/name", {"as_timm": 2}, LeafError, "leaf"),
        ("org/name", {"private": "yes"}, InputError, "private"),
    ],
)
def test_wrong_arguments(
    repository: Any,
    options: dict[str, Any],
    error: type[TreeifyError],
    message: str,
    converted: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        treeify.push(converted, repository, dry_run=True, out=tmp_path / "out", **options)
    assert [*tmp_path.iterdir()] == []


def test_folders_that_are_there_stay(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(CheckpointError, match=r"is not empty|is a file"):
            treeify.push(converted, "org/name", dry_run=True, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_no_ensemble(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no ensemble"):
        treeify.push(tmp_path / "empty", "org/name", dry_run=True, out=tmp_path / "out")
    export = tmp_path / "export"
    export.mkdir()
    (export / "ensemble.json").write_text(json.dumps({"format": "treeify-export"}))
    with pytest.raises(InputError, match=r"is an export[\s\S]*--with export"):
        treeify.push(export, "org/name", dry_run=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_ensemble_is_not_pushed(converted: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(converted, damaged)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError):
        treeify.push(damaged, "org/name", dry_run=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
