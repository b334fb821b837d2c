"""What `pip install treeify` gives: the main job runs without a clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
_SOURCES = (
    "treeify",
    "recipes",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def _call(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `treeify` of a fresh environment with a wheel that was built from a source archive."""
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("building needs setuptools 77: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in _SOURCES:
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    _call(sys.executable, "-c", build, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip")
    _call(*pip, "wheel", "--no-deps", "--no-build-isolation", archive, "-w", folder, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    _call(*pip, "--python", scripts / "python", "install", "--no-deps", wheel, cwd=folder)
    # What treeify depends on is that of these tests; a path file there is not read from here.
    (packages,) = (folder / "env").rglob("site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts / "treeify"


@pytest.mark.slow
def test_the_main_job_runs_without_a_clone(installed: Path, tmp_path: Path) -> None:
    where = _call(
        installed.with_name("python"),
        "-c",
        "import treeify; print(*treeify.__path__)",
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    listed = _call(installed, "recipes", cwd=tmp_path)
    names = [path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")]
    assert len(names) > 10
    assert all(name.with_suffix("").as_posix() in listed for name in names)
    quick = ("schedule.epochs=1", "model.splits=[block4]", "schedule.warmup_epochs=0")
    trained = _call(installed, "train", "digits_hne", *quick, cwd=tmp_path)
    assert "runs/digits_hne" in trained
    assert "held-out" in _call(installed, "eval", "runs/digits_hne", "--no-latency", cwd=tmp_path)


@pytest.mark.slow
def test_copies_are_trained_where_they_are(installed: Path, tmp_path: Path) -> None:
    _call(installed, "recipes", "digits_hne", "--copy", "mine", cwd=tmp_path)
    quick = ("schedule.epochs=1", "model.splits=[block4]", "schedule.warmup_epochs=0")
    _call(installed, "train", "mine/digits_hne.yaml", *quick, "name=mine", cwd=tmp_path)
    assert (tmp_path / "runs" / "mine" / "recipe.yaml").is_file()
