"""`treeify push`, and the hub's names wherever a command takes a directory."""

import json
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
import runs
import torch
from PIL import Image
from runner import run

import treeify
from treeify.data import Preparation
from treeify.deploy.exporter import export
from treeify.training.trainer import train

NAME = "hf-hub:org/name"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 90).save("digit.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    overrides = ("ema=null", "schedule.epochs=1")
    return train(runs.recipe(folder, *overrides), out=folder / "run").run.directory


@pytest.fixture(scope="module")
def published(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a push of the run puts into its repository, an export with it."""
    out = tmp_path_factory.mktemp("published") / "name"
    pushed = treeify.push(trained, "org/name", dry_run=True, out=out)
    hne = treeify.load(out)
    exported = export(hne, out / "export", tune=False).path
    paths = [*pushed.files, *(path.relative_to(out) for path in exported.iterdir())]
    return {path.as_posix(): (out / path).read_bytes() for path in paths}


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, bytes]
) -> Iterator[fake_hub.Hub]:
    """A hub to which the run was pushed."""
    with fake_hub.serving(tmp_path / "cache", monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        server.add("org/name", published)
        yield server


def test_a_dry_run(trained: Path) -> None:
    done = run("push", str(trained), "org/name", "--dry-run", "--license", "mit")
    assert done.exit_code == 0, done.output
    assert "Written to pushed/name" in done.output
    assert "nothing was sent" in done.output
    assert "license: mit" in Path("pushed/name/README.md").read_text()
    again = run("push", str(trained), "org/name", "--dry-run")
    assert again.exit_code == 2
    assert "is not empty" in again.output


def test_a_push(trained: Path, hub: fake_hub.Hub) -> None:
    done = run("push", str(trained), "org/other", "--private", "--json")
    assert done.exit_code == 0, done.output
    pushed = json.loads(done.output)
    assert pushed["url"].startswith(f"{hub.address}/org/other/commit/")
    assert hub.repos["org/other"].private
    done = run("push", NAME, "org/third")
    assert "treeify.load('hf-hub:org/third')" in done.output


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("option", "revision"), [(["--revision", "dev"], "dev"), (["--create-pr"], "refs/pr/1")]
)
def test_where_it_is_loaded_from(option: list[str], revision: str) -> None:
    done = run("push", NAME, "org/third", *option)
    assert done.exit_code == 0, done.output
    assert f"treeify.load('hf-hub:org/third@{revision}')" in done.output
    assert treeify.load(f"hf-hub:org/third@{revision}").leaves == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name"], "Expected org/name"),
        (["me/a--b"], "Expected org/name"),
        (["org/name", "--with", "exprot"], "did you mean 'export'"),
        (["org/name", "--with", ""], "names nothing"),
        (["org/name", "--as-timm", "0"], "no model of timm's"),
        (["org/name", "--as-timm", "0", "--with", "report"], "goes alone"),
    ],
)
def test_bad_input(arguments: list[str], message: str, trained: Path) -> None:
    done = run("push", str(trained), *arguments, "--dry-run")
    assert done.exit_code == 2
    assert message in done.output
    assert not Path("pushed").exists()


COMMANDS = {
    "predict": ["predict", NAME, "digit.png", "--json"],
    "eval": ["eval", NAME, "--no-latency"],
    "export": ["export", NAME, "--no-tune"],
    "benchmark": ["benchmark", NAME, "--repeats", "3"],
    "report": ["report", NAME, "--no-latency"],
    "weights": ["eval", NAME, "--no-latency", "--weights", NAME],
}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=pytest.mark.thorough if name in ("export", "report") else ())
        for name in COMMANDS
    ],
)
def test_commands_take_the_name(command: str) -> None:
    done = run(*COMMANDS[command])
    assert done.exit_code == 0, done.output
    if command == "export":
        assert Path("exported/name/ensemble.json").is_file()


def test_calibrating_leaves_the_cache_as_it_is(hub: fake_hub.Hub, tmp_path: Path) -> None:
    assert run("predict", NAME, "digit.png").exit_code == 0
    paths = [*(tmp_path / "cache" / "hub").rglob("blobs/*")]
    before = [path.read_bytes() for path in paths]
    done = run("calibrate", NAME, "--no-tune", "--repeats", "10", "--target-macs", "150k")
    assert done.exit_code == 0, done.output
    answered = json.loads(run("predict", NAME, "digit.png", "--deadline", "1s", "--json").output)
    assert not answered["measured_latencies"]
    assert paths
    assert [path.read_bytes() for path in paths] == before
    assert hub.repos["org/name"].files["config.json"] in before


@pytest.mark.usefixtures("hub")
def test_an_export_in_a_repository_answers() -> None:
    texts = [
        run("predict", name, "digit.png", "--json").output for name in (NAME, f"{NAME}/export")
    ]
    one, other = (json.loads(text)["images"][0]["answers"] for text in texts)
    assert len(one) == 3
    for ours, exported in zip(one, other, strict=True):
        assert (ours["leaves"], ours["label"]) == (exported["leaves"], exported["label"])
        assert ours["probability"] == pytest.approx(exported["probability"], abs=1e-4)


def test_recipes_take_the_name(hub: fake_hub.Hub, tmp_path: Path) -> None:
    path = runs.written(tmp_path, "schedule.epochs=1", "ema=null")
    done = run("train", str(path), f'teacher={{name: "{NAME}"}}', "--out", "taught")
    assert done.exit_code == 0, done.output
    assert f"name: {NAME}" in Path("taught/recipe.yaml").read_text()
    done = run("train", str(path), f"model.weights={NAME}", "model.init=perturb", "--out", "on")
    assert done.exit_code == 0, done.output
    assert f"weights: {NAME}" in Path("on/recipe.yaml").read_text()


def test_what_cannot_be_had_is_one_message(hub: fake_hub.Hub) -> None:
    hub.add("org/none", {"README.md": b""})
    for name in ("hf-hub:org/none", "hf-hub:org/nothing", "hf-hub:none"):
        done = run("predict", name, "digit.png")
        assert done.exit_code == 2
        assert done.output.startswith("CheckpointError: ")
        assert "Expected" in done.output


def test_nothing_that_a_recipe_in_a_repository_names_is_imported(
    hub: fake_hub.Hub, published: dict[str, bytes]
) -> None:
    recipe = published["recipe.yaml"].replace(b"name: digits\n", b"name: os:system\n")
    assert recipe != published["recipe.yaml"]
    hub.add("org/hostile", {**published, "recipe.yaml": recipe})
    done = run("eval", "hf-hub:org/hostile")
    assert done.exit_code == 2
    assert "names a data set that would be imported: data.name='os:system'" in done.output
    named = run("eval", "hf-hub:org/hostile", "--data", "name=digits", "--no-latency")
    assert named.exit_code == 0, named.output


def test_a_directory_may_be_called_local(trained: Path) -> None:
    done = run("predict", f"local-dir:{trained}", "digit.png")
    assert done.exit_code == 0, done.output


def test_one_leaf_for_timm(tmp_path: Path) -> None:
    example = torch.zeros(1, 3, 32, 32)
    hne = treeify.hierarchicalize("test_resnet", ["layer3"], example_input=example)
    hne.preparation = Preparation(size=(32, 32), mean=(0.5,), std=(0.5,))
    treeify.save(hne, tmp_path / "mine")
    done = run("push", "mine", "org/leaf", "--as-timm", "1", "--dry-run", "--out", "leaf")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("leaf/config.json").read_text())["architecture"] == "test_resnet"
