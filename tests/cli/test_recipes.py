"""`treeify recipes`, and the commands that take a recipe's name."""

import json
from pathlib import Path

import pytest
from runner import run

from treeify.training import shipped_recipes


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_are_listed() -> None:
    shown = run("recipes", columns=400)
    assert shown.exit_code == 0
    assert all(name in shown.output for name in shipped_recipes.names())
    listed = json.loads(run("recipes", "--json").output)
    assert [each["name"] for each in listed] == shipped_recipes.names()


def test_one_is_shown_as_it_is() -> None:
    text = shipped_recipes.find("digits_hne").read_text()
    assert run("recipes", "digits_hne").output == text


def test_a_copy_is_trained_by_its_path() -> None:
    copied = run("recipes", "cifar10_resnet_hne", "--copy", "mine")
    assert "treeify train mine/cifar10_resnet_hne.yaml" in copied.output
    assert sorted(path.name for path in Path("mine").iterdir()) == [
        "cifar10_resnet_hne.yaml",
        "cifar_resnet_hne.yaml",
    ]
    again = run("recipes", "cifar10_resnet_hne", "--copy", "mine")
    assert again.exit_code == 2
    assert "would replace files" in again.output
    assert run("recipes", "digits_hne", "--copy").exit_code == 0
    assert Path("digits_hne.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "did you mean"),
        (["--copy"], "without a recipe"),
        (["digits_hne", "mine"], "without --copy"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    done = run("recipes", *arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_train_and_ablate_find_names() -> None:
    # A wrong key is reported of the file that was found.
    for command, name in (("train", "digits_hne"), ("train", "ablations/structured")):
        done = run(command, name, "modle.splits=1")
        assert done.exit_code == 2
        assert f"{name}.yaml" in done.output
        assert "did you mean" in done.output
    shown = run("ablate", "ablations/digits", "--show")
    assert shown.exit_code == 0
    assert "0 of 30 runs have finished" in shown.output


def test_a_directory_is_no_recipe() -> None:
    Path("digits_hne").mkdir()
    done = run("train", "digits_hne")
    assert done.exit_code == 2
    assert "Found a directory" in done.output
