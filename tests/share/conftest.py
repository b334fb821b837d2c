"""A run on digits of seconds, ensembles without one, and a hub of this machine."""

from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
import runs
import torch

import treeify
from treeify.data import Preparation
from treeify.training.trainer import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    return train(
        runs.recipe(folder, "ema=null", "schedule.epochs=1"), out=folder / "run"
    ).run.directory


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of a model of timm's, which nobody trained here."""
    folder = tmp_path_factory.mktemp("converted")
    hne = treeify.hierarchicalize(
        "test_resnet", ["layer3"], init="fresh", example_input=torch.zeros(1, 3, 32, 32)
    )
    hne.preparation = Preparation(size=(32, 32), mean=(0.5,), std=(0.25,))
    treeify.save(hne, folder / "ensemble")
    return folder / "ensemble"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    with fake_hub.serving(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
def logged_in(hub: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
