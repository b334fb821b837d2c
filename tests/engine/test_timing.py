"""Actions are timed in turns, within a budget, and the thread setting comes back."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from treeify.engine import timing

CPU = torch.device("cpu")


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """Two actions of 1 and 3 seconds, under a clock that only they move; and their calls."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def action(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds
            calls.append(name)

        return run

    return {"quick": action("quick", 1.0), "slow": action("slow", 3.0)}, calls


def test_actions_take_turns_after_a_round_that_is_not_timed(
    actions: tuple[dict[str, Callable[[], None]], list[str]],
) -> None:
    times = timing.alternate(actions[0], CPU, repeats=4)
    assert times == {"quick": [1.0] * 4, "slow": [3.0] * 4}
    assert actions[1] == ["quick", "slow"] * 5
    assert timing.medians({"a": [1.0, 9.0, 2.0]}) == {"a": 2.0}


@pytest.mark.parametrize(
    ("budget", "at_least", "rounds"), [(0, 3, 3), (0, 0, 1), (9, 1, 3), (8, 1, 3), (7, 1, 2)]
)
def test_no_round_begins_after_the_budget(
    budget: float,
    at_least: int,
    rounds: int,
    actions: tuple[dict[str, Callable[[], None]], list[str]],
) -> None:
    times = timing.alternate(
        actions[0], CPU, repeats=10, budget=budget, at_least=at_least, warm_up=False
    )
    assert len(times["slow"]) == rounds


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with timing.threads(None):
        assert torch.get_num_threads() == before


def test_a_machine_is_told_by_its_processor_threads_and_torch() -> None:
    with timing.threads(1):
        text = timing.describe(CPU)
    assert text.endswith(f", 1 threads, torch {torch.__version__}")
