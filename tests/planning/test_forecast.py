"""Forecasts: what they add up to, between and beyond what was measured; and real ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import nn

import treeify
from treeify.conversion.assemble import trace_model
from treeify.planning import forecast as forecast_module
from treeify.planning import measure as measure_module
from treeify.planning.forecast import Forecast, _at_all, _origin, forecast
from treeify.planning.measure import measured
from treeify.tree import Tree


def test_times_of_levels_add_up_to_those_of_the_tree() -> None:
    times = Forecast(
        whole=10.0,
        behind={1: np.array([8.0, 4.0]), 2: np.array([12.0, 6.0]), 4: np.array([20.0, 10.0])},
        measured=(1, 2, 4),
        machine="",
    )
    tree = Tree((2, 2))
    counts = np.array([tree.branch_count(size) for size in tree.nested_sizes])
    # Before the first split 2 seconds; between them 4 alone, 6 for two branches; then 4, 6, 10.
    assert times.of_tree((0, 1), counts) == (2 + 4 + 4, 2 + 4 + 6, 2 + 6 + 10)


def test_between_and_beyond_what_was_measured_times_grow_in_a_straight_line() -> None:
    behind = {1: np.array([1.0]), 4: np.array([4.0]), 8: np.array([6.0])}
    found = _at_all(behind, [1, 2, 4, 6, 8, 16])
    assert {count: float(times[0]) for count, times in found.items()} == {
        1: 1.0,
        2: 2.0,
        4: 4.0,
        6: 5.0,
        8: 6.0,
        16: 10.0,
    }
    assert float(_at_all({1: np.array([3.0])}, [1, 4])[4][0]) == 12


def test_more_branches_never_take_less_time() -> None:
    found = _at_all({1: np.array([5.0]), 2: np.array([4.0]), 4: np.array([4.5])}, [1, 2, 4, 8])
    assert [float(times[0]) for times in found.values()] == sorted(
        float(times[0]) for times in found.values()
    )


def test_operations_stem_from_the_node_that_their_name_begins_with() -> None:
    position = {"relu": 0, "relu_1": 1, "layer1_0_conv1": 2}
    assert _origin("relu_1_packed_fused", position) == 1
    assert _origin("relu_fused", position) == 0
    assert _origin("layer1_0_conv1_", position) == 2


@pytest.fixture(scope="module")
def real() -> Forecast:
    model = small.build().eval()
    traced = trace_model(model, None, small.EXAMPLE)
    return forecast(model, traced, ["stage1", "stage2", "head"], [1, 2, 4, 8])


def test_less_time_is_spent_behind_later_points(real: Forecast) -> None:
    assert real.measured == (1, 2, 4, 8)
    for branches in (1, 2, 4, 8):
        stage1, stage2, head = real.behind[branches]
        assert stage1 > stage2 > head > 0
    assert real.whole > real.behind[1][0]
    assert "threads" in real.machine


def test_times_of_a_batch_are_divided_by_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def eight_seconds(action: Callable[[], Any], _: torch.device) -> float:
        for _round in range(3):
            action()
        return 8.0

    model = small.build().eval()
    traced = replace(trace_model(model, None, small.EXAMPLE), batch=4)
    monkeypatch.setattr(forecast_module, "_median_seconds", eight_seconds)
    assert forecast(model, traced, ["stage1"], [1]).whole == pytest.approx(2.0)
    monkeypatch.setattr(measure_module, "answer_seconds", lambda *_, **__: {1: 8.0, 2: 12.0})
    assert measured(model, traced, None, ["stage1:2"]) == (2.0, 3.0)


class OfPairs(nn.Module):
    """Takes images in pairs, and no single one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = self.first(x).reshape(-1, 2, 4 * 8 * 8)
        return self.second(pairs).flatten(0, 1)


def test_a_plan_says_that_its_times_are_parts_of_a_batch_s() -> None:
    pairs = treeify.plan(OfPairs(), example_input=torch.zeros(2, 3, 8, 8), max_ms=1000)
    assert "answers 2 images at once" in "".join(pairs.notes)
    single = treeify.plan(small.build(), example_input=small.EXAMPLE, max_ms=1000)
    assert "at once" not in "".join(single.notes)


def test_plans_by_time_have_forecasts_and_measure_beside_them() -> None:
    found = treeify.plan(
        small.build(), example_input=small.EXAMPLE, max_ms=1000, leaves=(2, 4), measure=True
    )
    assert found.budget.quantity == "ms"
    for position, tree in enumerate(found.candidates):
        assert tree.forecast is not None
        assert len(tree.forecast) == len(tree.nested)
        assert list(tree.forecast) == sorted(tree.forecast)
        assert (tree.measured is None) == (position >= 3)
    measured_first = found.candidates[0].measured
    assert measured_first is not None
    assert min(measured_first) > 0
    assert "ms forecast" in found.sentence
    assert "from 1, 2, 4 networks side by side, measured on " in "".join(found.notes)


def test_an_impossible_time_names_the_nearest_possible() -> None:
    with pytest.raises(treeify.TreeifyError, match=r"first_ms of at least [\d.]+ ms"):
        treeify.plan(small.build(), example_input=small.EXAMPLE, first_ms=1e-6)
    with pytest.raises(treeify.TreeifyError, match=r"at least [\d.]+ ms, the nearest possible"):
        treeify.plan(small.build(), example_input=small.EXAMPLE, max_ms=1e-6)


def test_measuring_gives_seconds_of_every_nested_size() -> None:
    model = small.build().train()
    traced = trace_model(model, None, small.EXAMPLE)
    seconds = measured(model, traced, None, ["stage1:2", "stage2:2"])
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert model.training
