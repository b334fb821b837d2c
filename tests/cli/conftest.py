"""What the commands are tried on; the memory allocator of the test process is left alone."""

import shutil
from pathlib import Path

import pytest
import runs
from cli import saved_ensembles as saved

import treeify


@pytest.fixture(autouse=True)
def untuned_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")


@pytest.fixture(scope="session")
def saved_ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to copy."""
    path = tmp_path_factory.mktemp("saved") / "ensemble"
    saved.save(path)
    return path


@pytest.fixture
def directories(saved_ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is: `run`, a run directory of the digits recipe, and an ensemble `alone`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_ensemble, tmp_path / "run" / "last")
    shutil.copy(saved.RECIPE, tmp_path / "run" / "recipe.yaml")
    shutil.copytree(saved_ensemble, tmp_path / "alone")
    return tmp_path


@pytest.fixture(scope="session")
def saved_export(saved_ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to copy: the same ensemble, exported."""
    path = tmp_path_factory.mktemp("exported") / "digits"
    saved.export(saved_ensemble, path)
    return path


@pytest.fixture
def exported(saved_export: Path, directories: Path) -> Path:
    """The export beside the ensembles it was made from, as the user names it."""
    shutil.copytree(saved_export, directories / "exported" / "run")
    return Path("exported/run")


@pytest.fixture
def hne(directories: Path) -> treeify.HierarchicalEnsemble:
    """The ensemble in both."""
    return treeify.load(directories / "alone", trust=True)


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a run of seconds, where the user is."""
    monkeypatch.chdir(tmp_path)
    return runs.tiny(tmp_path)
