"""A push is one commit of files that were checked here; a failure leaves nothing half-done."""

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import runs
import torch
import yaml

import treeify
from treeify.deploy.exported import ExportedEnsemble
from treeify.errors import CheckpointError, InputError, LeafError, TreeifyError
from treeify.share.places import recipe_without_places, text_without_places
from treeify.training.trainer import train

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
@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"model_type": "bert"}', "README.md": b"mine"},
        {"model_index.json": b"{}", "unet/model.safetensors": b"much"},
        {"adapter_config.json": b"{}", "README.md": b"---\ntags: [peft]\n---\n"},
        {"net.gguf": b"much"},
        {"pytorch_model.bin": b"much", "README.md": b"---\n[\n---\n"},
        {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": b"much"},
    ],
)
def test_models_of_others_are_not_overwritten(
    files: dict[str, bytes], converted: Path, hub: fake_hub.Hub
) -> None:
    repo = hub.add("org/theirs", files)
    with pytest.raises(InputError, match="holds a model of another library"):
        treeify.push(converted, "org/theirs")
    assert repo.files == files
    treeify.push(converted, "org/theirs", create_pr=True)
    assert repo.files == files


@pytest.mark.usefixtures("logged_in")
def test_a_leaf_replaces_a_model_of_timms(converted: Path, hub: fake_hub.Hub) -> None:
    hub.add("org/leaf", {"config.json": b'{"architecture": "resnet18"}'})
    treeify.push(converted, "org/leaf", as_timm=0)
    repo = hub.repos["org/leaf"]
    assert b"test_resnet" in repo.files["config.json"]
    # It says now that treeify wrote it.
    treeify.push(converted, "org/leaf")
    assert same(treeify.load("hf-hub:org/leaf"), treeify.load(converted))


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("files", [{}, {".gitattributes": b"", "README.md": b"soon"}])
def test_a_repository_without_a_model_is_filled(
    files: dict[str, bytes], converted: Path, hub: fake_hub.Hub
) -> None:
    hub.add("org/name", files)
    treeify.push(converted, "org/name")
    assert same(treeify.load(NAME), treeify.load(converted))


@pytest.mark.usefixtures("logged_in")
def test_the_branch_that_is_pushed_to_is_looked_at(converted: Path, hub: fake_hub.Hub) -> None:
    theirs = {"net.gguf": b"much"}
    repo = hub.add("org/name", {"README.md": b""})
    repo.commit(theirs, "theirs", "dev")
    with pytest.raises(InputError, match="holds a model of another library"):
        treeify.push(converted, "org/name", revision="dev")
    assert repo.commits[repo.branches["dev"]] == theirs
    # A branch that is to be made begins as the main one.
    repo.commit(theirs, "theirs too")
    with pytest.raises(InputError, match="holds a model of another library"):
        treeify.push(converted, "org/name", revision="next")
    assert repo.branches.keys() == {"main", "dev"}


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("create_pr", [False, True])
def test_what_is_private_goes_to_no_public_repository(
    create_pr: bool, converted: Path, hub: fake_hub.Hub
) -> None:
    repo = hub.add("org/name", {"README.md": b""})
    with pytest.raises(InputError, match=r"is public[\s\S]*private repository or a new one"):
        treeify.push(converted, "org/name", private=True, create_pr=create_pr)
    assert repo.messages == ["made by the test"]
    repo.private = True
    treeify.push(converted, "org/name", private=True, create_pr=create_pr)
    assert repo.messages == ["made by the test", "Pushed by treeify"]


@pytest.mark.usefixtures("logged_in")
def test_branches_and_pull_requests(converted: Path, hub: fake_hub.Hub) -> None:
    treeify.push(converted, "org/name", revision="next")
    repo = hub.repos["org/name"]
    assert "config.json" not in repo.files
    assert treeify.load(f"{NAME}@next").leaves == 2
    assert treeify.push(converted, "org/name", revision="next").revision == "next"
    pushed = treeify.push(converted, "org/name", create_pr=True)
    assert pushed.url == f"{hub.address}/org/name/discussions/1"
    assert "config.json" not in repo.files
    assert pushed.revision == "refs/pr/1"
    assert treeify.load(f"{NAME}@{pushed.revision}").leaves == 2


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


def published(directory: Path, out: Path) -> str:
    """All texts of a push, its report with them."""
    treeify.push(directory, "org/name", extras=["report"], dry_run=True, out=out)
    texts = (path for path in out.iterdir() if path.suffix not in (".safetensors", ".png"))
    return "".join(path.read_text() for path in texts)


def assert_nowhere(text: str, *places: str) -> None:
    assert not [place for place in places if place in text]


def test_places_of_this_machine_stay_here(trained: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    run = tmp_path / "private" / "run"
    shutil.copytree(trained, run, symlinks=True)
    recipe["out"] = str(run)
    recipe["teacher"] = {"name": "/home/me/secret/teacher"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe["model"]["weights"] = "/home/me/secret/w.pth"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    shared = published(run, out)
    assert_nowhere(shared, "/home/me/secret", str(tmp_path), "private")
    assert yaml.safe_load((out / "recipe.yaml").read_text())["teacher"] == {"name": "teacher"}
    # Data that are gone, of a run whose rates and epochs cannot be read either.
    recipe["data"] = {"name": "image_folder", "root": "/home/me/secret/photos", "size": 8}
    recipe["schedule"] = {"epochs": "many"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "metrics.jsonl").write_text("")
    shared = published(run, tmp_path / "gone")
    assert_nowhere(shared, "/home/me/secret", str(tmp_path), "private")
    assert "No held-out images that fit it were at hand." in shared


def test_places_of_unreadable_images_stay_here(tmp_path: Path) -> None:
    photos = runs.photos(tmp_path / "private photos", 8)
    recipe = runs.recipe(
        tmp_path,
        *("ema=null", "schedule.epochs=1", "batch_size=8", "skip_corrupt=1"),
        f"data={{name: image_folder, root: '{photos}', size: 8}}",
        *("model.kwargs.num_classes=2", "mix=null"),
    )
    run = train(recipe, out=tmp_path / "private run").run.directory
    (photos / "val" / "dark" / "0.png").write_bytes(b"no image")
    shared = published(run, tmp_path / "out")
    assert "1 images could not be read" in shared
    assert_nowhere(shared, str(tmp_path), "private run", "0.png")


def test_recipes_without_places() -> None:
    recipe = {"out": "/runs/x", "a": ["~/nets/w.pth", {"b": "/data/photos"}], "c": "relative/path"}
    cleaned = {"a": ["w.pth", {"b": "photos"}], "c": "relative/path"}
    assert recipe_without_places(recipe) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("weights: /home/me/my nets/w.pth, 'model'", "weights: (a path, left out)"),
        ("began with ~/w.pth", "began with (a path, left out)"),
        ("began with file:///home/me/w.pth", "began with (a path, left out)"),
        ("from '../nets/w.pth'", "from '(a path, left out)"),
        (r"weights: C:\nets\w.pth", "weights: (a path, left out)"),
        ("weights: hf-hub:timm/resnet18.a1_in1k", "weights: hf-hub:timm/resnet18.a1_in1k"),
        ("1/2 of https://example.org/x", "1/2 of https://example.org/x"),
    ],
)
def test_texts_without_places(text: str, cleaned: str) -> None:
    assert text_without_places(text) == cleaned


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
        ("org/a--b", {}, InputError, "Expected org/name"),
        ("org/a..b", {}, InputError, "Expected org/name"),
        ("org/name.git", {}, InputError, "Expected org/name"),
        ("org/" + 99 * "a", {}, InputError, "Expected org/name"),
        (None, {}, InputError, "Expected org/name"),
        ("org/name", {"extras": ["exprt"]}, InputError, "did you mean 'export'"),
        ("org/name", {"extras": "export"}, InputError, "extras"),
        ("org/name", {"as_timm": 0, "extras": ["report"]}, InputError, "goes alone"),
        ("org/name", {"as_timm": 0, "data": ["name=digits"]}, InputError, "is not measured"),
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


@pytest.mark.parametrize("is_there", [False, True])
def test_files_that_appear_meanwhile_stay(is_there: bool, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if is_there:
        out.mkdir()

    def intrude(what: str) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="cannot be written"):
        treeify.push(converted, "org/name", dry_run=True, out=out, observe=intrude)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


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
