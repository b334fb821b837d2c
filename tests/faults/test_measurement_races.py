"""What is measured at the same time, by threads or by processes, is all there afterwards."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import small
import torch

import treeify
from treeify import files
from treeify.anytime.confidence import Budget
from treeify.conversion.saving import save_measurements
from treeify.deploy.saved import checkpoint_in
from treeify.errors import CheckpointError


def budget(macs: int, threshold: float = 0.5) -> Budget:
    return Budget(macs, (1, 2, 3, 6), (threshold,) * 3, 0.0, 0.0, (0.0,) * 4, 1)


BASE = small.SmallNet()  # once: threads that draw numbers would disturb those that trace


def load(path: Path) -> treeify.HierarchicalEnsemble:
    return treeify.load(path, BASE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    treeify.save(small.ensemble(), tmp_path / "hne")
    return tmp_path / "hne"


def at_once(*targets: Callable[[], None]) -> None:
    """Run functions in threads; what one raises is raised."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def _measure(path: Path, first: int, count: int = 20) -> None:
    hne = load(path)
    for number in range(first, first + count):
        hne.budgets[number] = budget(number)
        save_measurements(hne, path)


def test_threads_lose_nothing(saved: Path) -> None:
    at_once(*(lambda first=first: _measure(saved, first) for first in (0, 100, 200)))
    assert load(saved).budgets.keys() == {
        n for first in (0, 100, 200) for n in range(first, first + 20)
    }
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_processes_lose_nothing(saved: Path) -> None:
    processes = [runs.forked(_measure, saved, first) for first in (0, 100)]
    assert runs.ends(processes) == [0, 0]
    assert load(saved).budgets.keys() == {*range(20), *range(100, 120)}


def test_one_ensemble_in_many_threads(saved: Path) -> None:
    hne = load(saved)
    hne.budgets[1] = budget(1)
    at_once(*[lambda: save_measurements(hne, saved)] * 8)
    assert load(saved).budgets == hne.budgets


def test_thresholds_stay_with_the_weights_they_were_chosen_for(saved: Path) -> None:
    """One process saves ensembles over one another, another measures whichever is there."""
    pair = [small.ensemble(seed=seed) for seed in (0, 1)]
    answers = [hne(small.images()) for hne in pair]
    over = threading.Event()

    def which(hne: treeify.HierarchicalEnsemble) -> int:
        (number,) = (n for n in (0, 1) if torch.equal(hne(small.images()), answers[n]))
        return number

    def overwrite() -> None:
        for number in range(40):
            treeify.save(pair[number % 2], saved, overwrite=True)
        over.set()

    def measure() -> None:
        while not over.is_set():
            hne = load(saved)
            hne.budgets[which(hne)] = budget(which(hne))
            try:
                save_measurements(hne, saved)
            except CheckpointError as error:
                assert "holds another ensemble" in str(error)

    def read() -> None:
        while not over.is_set():
            hne = load(saved)
            assert hne.budgets.keys() <= {which(hne)}

    at_once(overwrite, measure, read)
    assert which(load(saved)) == 1


def test_what_others_measured_anew_is_not_put_back(saved: Path) -> None:
    one, other = load(saved), load(saved)
    for hne in (one, other):
        hne.budgets = {1: budget(1), 2: budget(2)}
    save_measurements(one, saved)
    one, other = load(saved), load(saved)
    one.budgets[1] = budget(1, 0.9)
    one.execution = "looped"
    save_measurements(one, saved)
    other.budgets[3] = budget(3)
    del other.budgets[2]
    save_measurements(other, saved)
    assert load(saved).budgets == {1: budget(1, 0.9), 3: budget(3)}
    assert load(saved).execution == "looped"
    # Of an ensemble that was never read from there, all is new.
    copy = small.ensemble()
    copy.budgets[1] = budget(1, 0.1)
    save_measurements(copy, saved)
    assert load(saved).budgets == {1: budget(1, 0.1), 3: budget(3)}
    assert load(saved).execution == "auto"


def test_measurements_of_other_weights_are_refused(saved: Path) -> None:
    hne = load(saved)
    before = (saved / "config.json").read_bytes()
    with torch.no_grad():
        next(hne.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="holds another ensemble"):
        save_measurements(hne, saved)
    treeify.save(small.ensemble(seed=1), saved.with_name("other"))
    with pytest.raises(CheckpointError, match="holds another ensemble"):
        save_measurements(load(saved), saved.with_name("other"))
    assert (saved / "config.json").read_bytes() == before


def test_weights_that_are_no_numbers_are_themselves(saved: Path) -> None:
    hne = small.ensemble()
    with torch.no_grad():
        next(hne.parameters()).fill_(float("nan"))
    treeify.save(hne, saved, overwrite=True)
    save_measurements(hne, saved)


def test_a_link_is_followed_once(saved: Path, tmp_path: Path) -> None:
    """The state that was read is the one whose measurements are written."""
    run = tmp_path / "run"
    for number, seed in enumerate((0, 1)):
        treeify.save(small.ensemble(seed=seed), run / "checkpoints" / f"step-{number}")
    files.point(run / "last", run / "checkpoints" / "step-0")
    path = checkpoint_in(run)
    assert path == run / "checkpoints" / "step-0"
    hne = load(path)
    files.point(run / "last", run / "checkpoints" / "step-1")
    hne.budgets[7] = budget(7)
    save_measurements(hne, path)
    assert load(run / "checkpoints" / "step-0").budgets.keys() == {7}
    assert not load(run / "last").budgets
    assert checkpoint_in(run / "last") == run / "checkpoints" / "step-1"


def test_two_saves_at_once_leave_one_of_them(tmp_path: Path) -> None:
    pair = [small.ensemble(seed=seed) for seed in (0, 1)]
    refused = []

    def save(hne: treeify.HierarchicalEnsemble) -> None:
        try:
            treeify.save(hne, tmp_path / "hne")
        except CheckpointError as error:
            refused.append(str(error))

    at_once(*(lambda hne=hne: save(hne) for hne in pair))
    (message,) = refused
    assert "not empty" in message
    assert load(tmp_path / "hne")


def test_who_waits_too_long_is_told(saved: Path) -> None:
    waiting = pytest.raises(TimeoutError, match="others are writing")
    with files.locked(saved), waiting, files.locked(saved, 0.05):
        pass
    with files.locked(saved, 0):
        pass
