"""The commands of docs/training.md, run as they stand there on recipes made short."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import runner
import runs

import treeify

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [
    line
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if not kind and line.startswith(("treeify ", "torchrun ", "accelerate "))
]
SHORT = """\
extends: whole.yaml
name: digits_hne
schedule: {epochs: 1}
data: {held_out: 1497}
model: {splits: [block4]}
"""


def test_the_page_has_commands() -> None:
    kinds = {command.split()[0] for command in COMMANDS}
    assert kinds == {"treeify", "torchrun", "accelerate"}
    assert any("--resume" in command for command in COMMANDS)
    assert any("ablate" in command for command in COMMANDS)


@pytest.mark.thorough
def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    runs.photos(tmp_path / "photos")
    digits = tmp_path / "recipes" / "digits_hne.yaml"
    digits.rename(digits.with_name("whole.yaml"))
    digits.write_text(SHORT)
    (tmp_path / "RECIPE").write_text(digits.read_text().replace("whole", "recipes/whole"))
    for command in COMMANDS:
        if command.startswith("treeify "):
            result = runner.run(*arguments_of(command)[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}"
        elif "--nnodes 2" not in command:
            (done,) = finished([command], tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.thorough
def test_two_machines_share_a_run(tmp_path: Path) -> None:
    """The page's command twice, both machines being this one."""
    (command,) = (command for command in COMMANDS if "--nnodes 2" in command)
    assert "--rdzv-endpoint HOST:29500" in command  # without one, each looks for the other at home
    runs.written(tmp_path, "schedule.epochs=1", "schedule.warmup_epochs=0").rename(
        tmp_path / "RECIPE"
    )
    command = command.replace("HOST:29500", f"localhost:{runs.free_port()}")
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 1 --local-addr localhost")
    first, second = finished([command, command], tmp_path)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    output = first.stdout + second.stdout
    assert output.count("epoch 1/1") == 1
    assert treeify.load(tmp_path / "runs" / "tiny" / "last").leaves == 4


def finished(commands: Sequence[str], folder: Path) -> Sequence[subprocess.CompletedProcess[str]]:
    """The ends of commands that run at the same time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(partial(run, folder=folder), commands))


def arguments_of(command: str) -> list[str]:
    """As it stands there, but short: one seed, one epoch, a small model, two processes."""
    command = command.replace("--seeds 5", "--seeds 1").replace("-epochs 10", "-epochs 1")
    command = command.replace("--model resnet18", "--model test_resnet --epochs 1 workers=0")
    return command.replace("--nproc-per-node 4", "--nproc-per-node 2").split()


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = arguments_of(command)
    start = {
        "torchrun": ["-m", "torch.distributed.run"],
        "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    }[program]
    if program == "accelerate":
        arguments[1:1] = ["--cpu", "--num_processes", "2"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_trained_backbone_is_fine_tuned_from_a_file(tmp_path: Path) -> None:
    import timm
    import torch

    from treeify.training.model import build
    from treeify.training.recipe_file import load_recipe
    from treeify.training.run_directory import RunDirectory
    from treeify.training.trainer import train

    runs.photos(tmp_path / "photos", size=40, each=4)
    torch.manual_seed(0)
    trained = timm.create_model("test_resnet")
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    recipe = load_recipe(
        ROOT / "recipes" / "finetune_image_folder.yaml",
        [
            "model.name=test_resnet",
            "model.kwargs.num_classes=2",
            f"model.kwargs.pretrained_cfg_overlay.file={tmp_path}/weights.pth",
            f"data.root={tmp_path / 'photos'}",
            *("data.size=32", "data.like=null", "model.splits=1", "batch_size=4", "workers=0"),
            # A few plain images are learnt in seconds; turned around they would be each other.
            *("data.auto_augment=null", "data.random_erasing=0", "optimizer.lr=5e-3"),
            *("schedule.epochs=4", "schedule.warmup_epochs=1"),
        ],
    )
    first = build(recipe, recipe.data.load()).leaf(0).state_dict()
    for key, value in trained.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(first[key], value), key
    result = train(recipe, out=tmp_path / "run")
    first_epoch, *_, last_epoch = RunDirectory(result.run.directory).metrics()
    assert last_epoch.loss < 0.9 * first_epoch.loss


@pytest.mark.parametrize("missing", ["model.name=no_such_net", "data.name=no_such_data"])
def test_a_wrong_name_is_one_clear_message(tmp_path: Path, missing: str) -> None:
    file = runs.written(tmp_path)
    done = runner.run("train", str(file), missing)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert "no_such" in done.output
