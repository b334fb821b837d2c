"""A plan is what was set, and where that is left open what was tuned for the nearest batch."""

from collections.abc import Sequence

import pytest
import small
import torch
from torch import Tensor

import treeify
from treeify.engine import timing
from treeify.engine.plan import TUNING, Plan, Situation, Tuning
from treeify.errors import InputError


def _tuning(
    x: Tensor, execution: Sequence[str], *, training: bool = False, place: str | None = None
) -> Tuning:
    here = Situation.of(x, training=training)
    situation = Situation(training, here.shape, here.dtype, place or here.machine)
    return Tuning(
        situation, Plan(tuple(execution), channels_last=True, fuse=not training), {"a": 0.5}
    )


def _keep(hne: treeify.HierarchicalEnsemble, *tunings: Tuning) -> None:
    hne.tunings.update({tuning.situation: tuning for tuning in tunings})


@pytest.mark.parametrize(
    "setting", ["packed", "looped", "auto", ("packed", "auto", "looped"), ["auto"] * 3]
)
def test_the_setting_is_what_was_set(setting: str | Sequence[str]) -> None:
    hne = small.ensemble()
    assert hne.execution == "auto"
    hne.execution = setting
    assert hne.execution == (setting if isinstance(setting, str) else tuple(setting))
    asked = (setting,) * 3 if isinstance(setting, str) else setting
    assert hne.plan(small.images()).execution == tuple(
        "packed" if level == "auto" else level for level in asked
    )


@pytest.mark.parametrize(
    "setting",
    ["loop", "Packed", "", (), ("packed",), ("packed",) * 4, ("packed", "looped", "x"), 3, None],
)
def test_a_setting_that_is_no_way_to_run_changes_nothing(setting: object) -> None:
    hne = small.ensemble()
    hne.execution = ("packed", "looped", "auto")
    with pytest.raises(InputError, match="one of them for each of the 3 levels"):
        hne.execution = setting  # type: ignore[assignment]
    assert hne.execution == ("packed", "looped", "auto")


def test_a_plan_is_the_one_tuned_for_the_shape() -> None:
    hne, x = small.ensemble(), small.images(4)
    tuned = _tuning(x, ("packed", "looped", "looped"))
    _keep(hne, tuned)
    assert hne.plan(x) == tuned.plan
    assert hne.train().plan(x) == Plan(("packed",) * 3)


@pytest.mark.parametrize(("count", "nearest"), [(0, 1), (1, 1), (3, 1), (5, 16), (300, 16)])
def test_other_batches_run_like_the_nearest(count: int, nearest: int) -> None:
    hne = small.ensemble()
    plans = {1: ("packed",) * 3, 16: ("looped",) * 3}
    _keep(hne, *(_tuning(small.images(n), execution) for n, execution in plans.items()))
    assert hne.plan(small.images(count)).execution == plans[nearest]


def test_tunings_for_something_else_are_left_alone() -> None:
    hne, x = small.ensemble(), small.images(4)
    execution = ("looped",) * 3
    _keep(
        hne,
        _tuning(x, execution, place="another machine"),
        _tuning(x, execution, training=True),
        _tuning(x.double(), execution),
        _tuning(torch.zeros(4, 3, 16, 16), execution),
    )
    assert hne.plan(x) == Plan(("packed",) * 3)


def test_the_setting_overrides_what_was_tuned_level_by_level() -> None:
    hne, x = small.ensemble(), small.images(4)
    _keep(hne, _tuning(x, ("packed", "looped", "looped")))
    hne.execution = ("looped", "auto", "packed")
    assert hne.plan(x) == Plan(("looped", "looped", "packed"), channels_last=True, fuse=True)
    hne.execution = "packed"
    assert hne.plan(x).execution == ("packed",) * 3


@pytest.mark.parametrize("channels_last", [True, False, None])
def test_a_plan_lays_out_images(channels_last: bool | None) -> None:
    x = small.images()
    arranged = Plan(("packed",), channels_last).arrange(x)
    assert torch.equal(arranged, x)
    assert arranged.is_contiguous(memory_format=torch.channels_last) is (channels_last is True)
    features = x.flatten(1)
    assert Plan(("packed",), channels_last).arrange(features) is features


@pytest.mark.parametrize("channels_last", [True, False, None])
def test_measurements_survive_json(channels_last: bool | None) -> None:
    x = small.images()
    plan = Plan(("packed", "looped"), channels_last, fuse=True)
    tuning = Tuning(Situation.of(x, training=True), plan, {str(plan): 0.1, "other": 2.0})
    again = TUNING.validate_json(TUNING.dump_json(tuning, by_alias=True))
    assert again == tuning
    assert {again.situation: again} == {tuning.situation: tuning}
    assert hash(again.plan) == hash(plan)


def test_situations_name_the_machine() -> None:
    x = small.images()
    situation = Situation.of(x, training=False)
    assert situation.machine == timing.describe(x.device)
    assert torch.__version__ in situation.machine
    assert str(situation) == "inference, 2x3x8x8 float32"
    assert str(Plan(("packed", "looped"), True, True)) == "packed looped, channels_last, fused"
