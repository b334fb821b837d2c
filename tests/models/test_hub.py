"""Ensembles in repositories of the hub: fetched, opened as any directory, and never run."""

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import pytest
import timm
import torch

import treeify
from treeify import files
from treeify.conversion import checksums
from treeify.errors import CheckpointError
from treeify.models import hub as repositories
from treeify.models.hub import Repository, ensemble_named, local_path
from treeify.models.hub_errors import explained

NAME = "hf-hub:org/name"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "ensemble"
    example = torch.zeros(1, 3, 32, 32)
    treeify.save(treeify.hierarchicalize("test_resnet", ["layer3"], example_input=example), path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    with fake_hub.serving(tmp_path / "cache", monkeypatch) as server:
        yield server


def content(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def blobs(tmp_path: Path) -> dict[str, str]:
    paths = (tmp_path / "cache" / "hub").rglob("blobs/*")
    return {path.name: hashlib.sha1(path.read_bytes()).hexdigest() for path in paths}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing answer at the hub's address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("hf-hub:org/name", Repository("org/name")),
        ("hf-hub:org/na.me@v1.0", Repository("org/na.me", revision="v1.0")),
        ("hf-hub:org/name@refs/pr/3", Repository("org/name", revision="refs/pr/3")),
        ("hf-hub:org/name/export@main", Repository("org/name", "export", "main")),
    ],
)
def test_names(text: str, repository: Repository) -> None:
    assert Repository.of(text) == repository
    assert str(repository) == text


@pytest.mark.parametrize(
    "text",
    [
        *("hf-hub:", "hf-hub:name", "hf-hub:org/name@", "hf-hub:org/name/../x", "hf-hub:a b/c"),
        *("hf-hub:org/a--b", "hf-hub:org/name.git", "hf-hub:-org/name"),
    ],
)
def test_names_that_cannot_be(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"names no repository[\s\S]*Expected hf-hub:org/na"):
        treeify.load(text)


def test_paths_are_what_they_were(saved: Path) -> None:
    assert local_path("some/where") == Path("some/where")
    assert local_path(f"local-dir:{saved}") == saved
    assert treeify.load(f"local-dir:{saved}").leaves == 2


def test_an_ensemble_is_loaded_and_fetched_once(saved: Path, hub: fake_hub.Hub) -> None:
    repo = hub.add(
        "org/name", {**content(saved), "README.md": b"#", "code.py": b"raise SystemExit"}
    )
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(treeify.load(NAME)(x), treeify.load(saved)(x))
    asked = [line for line in hub.requests if "/resolve/" in line]
    assert not [line for line in asked if "README" in line or "code.py" in line]
    assert treeify.load(f"{NAME}@{repo.branches['main']}").leaves == 2
    assert [line for line in hub.requests if "/resolve/" in line] == asked


def test_a_revision_is_what_it_was(saved: Path, hub: fake_hub.Hub) -> None:
    repo = hub.add("org/name", content(saved))
    old, first = local_path(NAME), repo.branches["main"]
    repo.commit({**content(saved), "recipe.yaml": b"name: newer\n"}, "newer")
    assert (local_path(NAME) / "recipe.yaml").is_file()
    assert local_path(f"{NAME}@{first}") == old
    assert not (old / "recipe.yaml").exists()


def test_a_folder_of_a_repository(saved: Path, hub: fake_hub.Hub) -> None:
    hub.add("org/name", {f"inner/{name}": data for name, data in content(saved).items()})
    assert treeify.load(f"{NAME}/inner").leaves == 2
    with pytest.raises(CheckpointError, match="is no repository of treeify's"):
        treeify.load(NAME)


def test_measurements_leave_the_cache_as_it_is(
    saved: Path, hub: fake_hub.Hub, tmp_path: Path
) -> None:
    hub.add("org/name", content(saved))
    hne = treeify.load(NAME)
    before = blobs(tmp_path)
    hne.calibrate(hne.example_images(1), repeats=10)
    treeify.conversion.saving.save_measurements(hne, local_path(NAME))
    assert treeify.load(NAME).latencies.keys() == hne.latencies.keys()
    assert hne.latencies
    assert blobs(tmp_path) == before
    assert before


def test_the_copy_holds_no_links_and_shares_the_large_files(
    hub: fake_hub.Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repositories, "_SMALL", 100_000)
    hub.add("org/name", content(saved))
    folder = local_path(NAME)
    assert not any(path.is_symlink() for path in folder.iterdir())
    for path in folder.iterdir():
        files.require_inside(path, folder)
    assert (folder / "model.safetensors").stat().st_nlink == 2
    assert (folder / "config.json").stat().st_nlink == 1


def test_nothing_that_a_repository_names_is_imported(
    saved: Path, hub: fake_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["architecture"] = {"name": "evil_hub:net", "kwargs": {}}
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef net(): ...\n"
    sealed = checksums.seal(config).encode()
    hub.add("org/name", {**content(saved), "config.json": sealed, "evil_hub.py": code.encode()})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_hub.py").write_text(code)
    with pytest.raises(CheckpointError, match=r"'evil_hub:net' would be imported[\s\S]*trust=True"):
        treeify.load(NAME)
    assert not (tmp_path / "ran").exists()
    assert not (local_path(NAME) / "evil_hub.py").exists()
    with pytest.raises(treeify.TreeifyError, match="builds no model"):
        treeify.load(NAME, trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "settings", "name", "message"),
    [
        ({}, {}, "hf-hub:org/other", r"is not there, or is private[\s\S]*log in"),
        ({}, {"private": True}, NAME, r"is not there, or is private[\s\S]*log in"),
        ({}, {"gated": True}, NAME, r"is gated[\s\S]*Found 403 Access is restricted[\s\S]*Ask for"),
        ({}, {}, f"{NAME}@v9", r"has no such revision"),
        ({"README.md": b""}, {}, NAME, r"is no repository of treeify's[\s\S]*no config.json"),
        ({"config.json": b"[1"}, {}, NAME, r"is no repository of treeify's"),
        (
            {"config.json": b'{"architecture": "resnet18"}'},
            {},
            NAME,
            r"a model of timm, 'resnet18'",
        ),
        ({"config.json": b'{"model_type": "bert"}'}, {}, NAME, r"of another library"),
    ],
)
def test_what_cannot_be_had(
    files: dict[str, bytes], settings: dict, name: str, message: str, hub: fake_hub.Hub
) -> None:
    hub.add("org/name", files, **settings)
    with pytest.raises(CheckpointError, match=message):
        treeify.load(name)


def test_a_large_file_of_somebody_elses_is_not_fetched(hub: fake_hub.Hub) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"much"})
    with pytest.raises(CheckpointError, match="is no repository"):
        treeify.load(NAME)
    assert not [line for line in hub.requests if "safetensors" in line]


def test_without_a_network_what_was_fetched_is_loaded(
    saved: Path, hub: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", content(saved))
    treeify.load(NAME)
    offline(monkeypatch)
    assert treeify.load(NAME).leaves == 2
    with pytest.raises(CheckpointError, match=r"cannot be fetched[\s\S]*local-dir:DIR"):
        treeify.load("hf-hub:org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert treeify.load(NAME).leaves == 2
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        treeify.load("hf-hub:org/other")


def test_a_fetch_that_fails_leaves_no_half_copy(
    saved: Path, hub: fake_hub.Hub, tmp_path: Path
) -> None:
    hub.add("org/name", content(saved))
    hub.broken = "model.safetensors"
    with pytest.raises(CheckpointError, match="Found 400"):
        treeify.load(NAME)
    assert not (tmp_path / "cache" / "assets").exists()
    hub.broken = ""
    assert treeify.load(NAME).leaves == 2


def test_a_partial_fetch_is_not_kept(
    saved: Path, hub: fake_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", content(saved))
    fetch = huggingface_hub.snapshot_download

    def fetch_description(name: str, allow_patterns: list[str], **options: Any) -> str:
        """As versions of the client do that find nothing else in the cache, without a network."""
        return fetch(name, allow_patterns=["config.json"], **options)

    with monkeypatch.context() as context:
        context.setattr(huggingface_hub, "snapshot_download", fetch_description)
        with pytest.raises(CheckpointError, match=r"is not whole[\s\S]*no model[\s\S]*Try again"):
            treeify.load(NAME)
    assert not (tmp_path / "cache" / "assets").exists()
    assert treeify.load(NAME).leaves == 2


@pytest.mark.parametrize("lacking", ["step-1.onnx", "step-1.onnx.data"])
def test_a_partial_export_is_not_kept(lacking: str, hub: fake_hub.Hub) -> None:
    step = {"file": "step-1.onnx", "data": {"file": "step-1.onnx.data"}}
    manifest = {"format": "treeify-export", "steps": [step]}
    files = {"ensemble.json": json.dumps(manifest).encode()}
    repo = hub.add("org/name", {**files, "step-1.onnx": b"1", "step-1.onnx.data": b"1"})
    whole = repo.branches["main"]
    repo.commit({name: data for name, data in repo.files.items() if name != lacking}, "partial")
    with pytest.raises(CheckpointError, match=rf"is not whole[\s\S]*no {lacking}\b"):
        local_path(NAME)
    assert (local_path(f"{NAME}@{whole}") / lacking).is_file()


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        (False, r"cannot be fetched[\s\S]*hf download"),
        (True, r"cannot be written to[\s\S]*Nothing"),
    ],
)
def test_a_page_of_a_proxy_is_no_card(writes: bool, message: str) -> None:
    with (
        pytest.raises(CheckpointError, match=message),
        explained("hf-hub:org/name", writes=writes),
    ):
        json.loads("<html>log in</html>")


def test_a_value_that_is_read_is_no_card() -> None:
    with pytest.raises(CheckpointError, match="cannot be fetched"), explained("hf-hub:org/name"):
        raise ValueError("no such encoding")


def test_two_processes_may_fetch_at_once(saved: Path, hub: fake_hub.Hub) -> None:
    hub.add("org/name", content(saved))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local_path(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert content(found[0]) == content(saved)


def test_weights_and_teachers(saved: Path, hub: fake_hub.Hub) -> None:
    hub.add("org/name", content(saved))
    hub.add("timm/net", {"config.json": b'{"architecture": "resnet18"}'})
    assert ensemble_named(NAME) == local_path(NAME)
    assert ensemble_named("hf-hub:timm/net") is None
    assert ensemble_named("resnet18") is None
    assert ensemble_named(str(saved)) == saved
    x = torch.zeros(1, 3, 32, 32)
    hne = treeify.hierarchicalize("test_resnet", ["layer3"], example_input=x, weights=NAME)
    assert torch.equal(hne.eval()(x), treeify.load(saved)(x))


def test_a_plain_directory_of_timm_is_a_model(saved: Path, tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    assert ensemble_named(f"local-dir:{tmp_path}") is None
    assert ensemble_named(f"local-dir:{saved}") == saved


def test_nothing_is_saved_under_a_repositorys_name(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a repository of the hub[\s\S]*treeify.push"):
        treeify.save(treeify.load(saved), NAME)
