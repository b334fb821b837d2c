"""Grids of tiny runs."""

import json
import shutil
from pathlib import Path

import pytest
import runner
import runs
import torch

from treeify.errors import CheckpointError, RecipeError
from treeify.training.ablation import ablate, cells, expand, last_epoch, load_grid, results, table
from treeify.training.events import Reporter

FOLDER = Path(__file__).parents[2] / "recipes" / "ablations"
GRID = """\
name: small
recipe: tiny.yaml
overrides: [schedule.epochs=1, schedule.warmup_epochs=0.0]
seeds: 2
variants:
  L_I: [loss.name=independent]
  L_HD: {overrides: [loss.alpha=0.3]}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    runs.written(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "grid.yaml"


def test_a_grid_is_trained_once_and_compared(grid: Path, tmp_path: Path) -> None:
    grid_runs = expand(grid, tmp_path / "out")
    assert [(run.variant, run.seed) for run in grid_runs] == [
        *(("L_I", 0), ("L_I", 1)),
        *(("L_HD", 0), ("L_HD", 1)),
    ]
    assert [run.recipe.seed for run in grid_runs] == [0, 1, 0, 1]
    assert grid_runs[2].recipe.loss.options["alpha"] == 0.3

    count = []

    def started(run: object) -> Reporter:
        count.append(run)
        return runs.InterruptAt(1) if len(count) == 2 else Reporter()

    assert not ablate(grid_runs, started=started)
    assert [last_epoch(run) is not None for run in grid_runs] == [True, False, False, False]
    assert ablate(grid_runs, started=started)
    assert len(count) == 2 + 3
    assert ablate(grid_runs, started=started)
    assert len(count) == 2 + 3
    found = table(results(grid_runs))
    assert list(found) == ["L_I", "L_HD"]
    accuracies = [last_epoch(run).held_out[-1].accuracy for run in grid_runs[:2]]
    assert found["L_I"][4].mean == pytest.approx(sum(accuracies) / 2)
    assert found["L_I"][4].deviation == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)

    shown = runner.run("ablate", str(grid), "--out", str(tmp_path / "out"), "--show")
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "out" / "results.json").exists()
    runner.run("ablate", str(grid), "--out", str(tmp_path / "out"))
    assert "4 of 4 runs have finished" in shown.output
    assert f"{found['L_I'][4]}" in shown.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (run.variant, run.seed) for run in grid_runs
    ]


def test_variants_can_be_shared_among_commands(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    counts = []
    for variant in ("L_HD", "L_I"):
        done = runner.run("ablate", str(grid), "--out", str(out), "--seeds=1", "--only", variant)
        assert done.exit_code == 0, done.output
        assert ", seed 0: " in done.output
        rows = json.loads((out / "results.json").read_text())
        counts.append([row["variant"] for row in rows])
    assert counts == [["L_HD"], ["L_I", "L_HD"]]
    wrong = runner.run("ablate", str(grid), "--out", str(out), "--only", "L_X")
    assert wrong.exit_code == 2
    assert "some of L_I, L_HD" in wrong.output


def test_a_run_without_its_last_state_has_not_finished(grid: Path, tmp_path: Path) -> None:
    """As `kill -9` between the last line of its metrics and its last state leaves it."""
    (run, *_) = expand(grid, tmp_path / "out", seeds=1)
    assert ablate([run])
    finished = last_epoch(run)
    assert finished is not None
    bits = runs.weights(run.directory)
    shutil.rmtree((run.directory / "last").resolve())
    earlier = expand(grid, tmp_path / "other", seeds=1)[0]

    assert not ablate([earlier], started=lambda _: runs.InterruptAt(1))
    (run.directory / "last").unlink()
    for state in (earlier.directory / "checkpoints").iterdir():
        shutil.copytree(state, run.directory / "checkpoints" / state.name)
        (run.directory / "last").symlink_to(Path("checkpoints", state.name))
    assert last_epoch(run) is None
    assert ablate([run])
    again = last_epoch(run)
    assert again is not None
    assert again.held_out == finished.held_out
    assert all(torch.equal(own, bits[key]) for key, own in runs.weights(run.directory).items())


def test_a_grid_that_changed_takes_no_old_results(grid: Path, tmp_path: Path) -> None:
    first = expand(grid, tmp_path / "out", seeds=1)[:1]
    assert ablate(first)
    grid.write_text(GRID.replace("loss.name=independent", "loss.name=structured"))
    with pytest.raises(CheckpointError, match="another recipe"):
        ablate(expand(grid, tmp_path / "out", seeds=1)[:1])


def test_cells_round_and_spread() -> None:
    assert str(cells([90.0, 92.0])) == "91.00 ±1.41"
    assert str(cells([90.0])) == "90.00"


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("recipe: tiny.yaml\n", "", "recipe: Field required"),
        ("variants:", "variant:", "variants: Field required"),
        ("seeds: 2", "seeds: 0", "seeds"),
        ("tiny.yaml", "nowhere.yaml", "nowhere.yaml"),
        ("loss.alpha=0.3", "loss.alhpa=0.3", "did you mean 'alpha'"),
        (GRID, "{", "cannot be read"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    grid: Path, tmp_path: Path, old: str, new: str, match: str
) -> None:
    grid.write_text(GRID.replace(old, new))
    with pytest.raises(RecipeError, match=match):
        expand(grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_that_ship_are_valid(path: Path, tmp_path: Path) -> None:
    if "\nvariants:" in path.read_text():
        assert expand(path, tmp_path, seeds=1)
        assert load_grid(path).name
        assert "# Source: " in path.read_text()
