"""What was measured, as one value that goes to JSON and back."""

import json

import small
import torch

from treeify.anytime.confidence import Budget
from treeify.conversion.measurements import MEASUREMENTS, Measurements


def measured() -> Measurements:
    hne, x = small.ensemble(), small.images()
    hne.execution = ["packed", "looped", "auto"]
    hne.tune(x, repeats=1, budget=0.0)
    hne.calibrate(x, repeats=2, budget=0.0)
    hne.budgets[7] = Budget(7, (1, 3, 6), (0.9, 0.8), 6.5, 0.75, (0.5, 0.25, 0.25), 4)
    return hne.measurements


def test_json_and_back() -> None:
    before = measured()
    text = json.dumps(MEASUREMENTS.dump_python(before, mode="json", by_alias=True))
    assert MEASUREMENTS.validate_python(json.loads(text)) == before
    assert list(json.loads(text)) == ["execution", "tunings", "latencies", "budgets"]


def test_an_ensemble_takes_over_what_another_measured() -> None:
    before, hne = measured(), small.ensemble()
    assert hne.measurements == Measurements()
    hne.measurements = before
    assert hne.measurements == before
    assert hne.execution == ("packed", "looped", "auto")
    (latencies,) = hne.latencies.values()
    assert hne.latencies[latencies.situation].sizes == (1, 3, 6)
    assert hne.budgets[7].thresholds == (0.9, 0.8)


def test_parameters_take_the_memory_format_that_was_tuned() -> None:
    before, hne = measured(), small.ensemble()
    (tuning,) = before.tunings
    hne.measurements = before
    weight = hne.get_submodule("stage1.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == tuning.plan.channels_last
