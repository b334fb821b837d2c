"""Invariants 1 to 5 over the zoo: real backbones and odd ones, three tree shapes."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
import zoo
from torch import Tensor, nn
from torch.testing import assert_close

import treeify


def _marks(case: zoo.Case, shape: str) -> list[pytest.MarkDecorator]:
    """Backbones take seconds; odd ones, and thin ones in one shape, stand for them by default."""
    small = str(case).startswith("odd-") or (str(case).endswith("-thin") and shape == "binary")
    return [pytest.mark.slow] * (shape in case.slow) + [pytest.mark.thorough] * (not small)


CASES = [
    pytest.param(case, shape, id=f"{case}-{shape}", marks=_marks(case, shape))
    for case in zoo.cases(slow=None)
    for shape in case.shapes
]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())
    }


@pytest.mark.parametrize(("case", "shape"), CASES)
def test_every_leaf_equals_its_own_network(case: zoo.Case, shape: str) -> None:
    """Leaf, prefix and gradient parity; eval and train mode, batch statistics included."""
    model = case.model()
    hne = treeify.hierarchicalize(
        model,
        splits=case.splits(shape),
        init="perturb",
        example_input=case.images(1),
    )
    figures = treeify.verify(hne, case.images())
    assert figures.worst <= 1
    never_used = {name for name in figures.ungraded if "never" not in name}
    assert never_used <= {name for name, _ in model.named_parameters()}
    assert len(never_used) <= case.ungraded


@pytest.mark.thorough
@pytest.mark.parametrize("case", zoo.cases(), ids=str)
def test_the_base_model_is_untouched_and_copies_are_exact(case: zoo.Case) -> None:
    model = case.model().train()
    next(iter(model.children())).eval()  # a mixed mode must come back as it was
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before, modes = _state(model), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    hne = treeify.hierarchicalize(
        model, splits=case.splits("wide"), init="copy", example_input=case.images(1)
    )

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert calls == [1, 1]  # on a copy, once in each mode: whether it changes anything
    calls.clear()
    after = _state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert hne.state_dict().keys() == model.state_dict().keys()

    model.eval()
    hne.eval()
    x = case.images()
    with torch.no_grad():
        expected = model(x)
        for index in range(hne.leaves):
            assert_close(hne.leaf(index)(x), expected, rtol=0, atol=0)


def test_a_wrong_weight_is_noticed() -> None:
    """The oracle can fail: packing that mixes two branches up breaks parity."""
    case = zoo.cases()[0]
    hne = treeify.hierarchicalize(
        case.model(), case.splits("wide"), init="perturb", example_input=case.images(1)
    )
    x = case.images()
    hne.eval()
    logits = hne(x)
    broken = copy.deepcopy(hne)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.mul_(1.01)
    assert not torch.allclose(broken(x), logits, rtol=1e-4, atol=1e-5)

    class Swapped(type(hne)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, leaves: int | None = None) -> torch.Tensor:
            out = super().forward(x, leaves)
            return out.flip(1) if leaves is None else out

    broken.__class__ = Swapped
    with pytest.raises(treeify.TreeifyError, match="parity is off"):
        treeify.verify(broken, x)


@pytest.mark.parametrize("check", [treeify.verify, treeify.parity.verify.verify_outputs])
def test_what_are_no_images_for_the_model_is_refused(check: Callable[..., object]) -> None:
    with pytest.raises(treeify.TreeifyError, match="the input does not fit the model"):
        check(small.ensemble(), torch.zeros(2, 1, 8, 8))


def test_weights_are_checked_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy with other weights besides, if some are fresh."""
    hne, x = small.ensemble(), small.images()
    treeify.parity.fresh_weights.settle(hne)
    seen: list[Any] = []
    find = treeify.parity.checks.deviation

    def watched(actual: Any, expected: Any, scale: float = 1.0) -> float:
        seen.append(expected)
        return find(actual, expected, scale)

    def outputs() -> int:
        """How many different answers of the first leaf others were held against."""
        seen.clear()
        assert treeify.verify(hne, x).worst <= 1
        own = hne.leaf(0).eval()(x)
        assert torch.equal(seen[0], own)
        shaped = [one for one in seen if isinstance(one, torch.Tensor) and one.shape == own.shape]
        return len({tuple(one.flatten().tolist()) for one in shaped})

    monkeypatch.setattr("treeify.parity.checks.deviation", watched)
    of_leaves = 2 * hne.leaves  # in both modes
    assert outputs() == of_leaves
    with torch.no_grad():
        hne.get_parameter("head.bias").fill_(0.7)  # as fresh as zeros
    assert outputs() == of_leaves + hne.leaves


class Coarse(small.SmallNet):
    """Takes the difference of large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem[0] = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x + 1e6) - 1e6)


@pytest.mark.parametrize(
    ("model", "training", "off", "noticed"),
    [
        (small.SmallNet, False, 1e-2, True),
        (Coarse, False, 1e-2, False),
        (Coarse, False, float("nan"), True),
        # Rounding may change the sign of what a ReLU is given.
        (small.SmallNet, True, 1e-2, False),
        (small.SmallNet, True, float("nan"), True),
    ],
)
def test_float32_may_be_off_by_what_rounding_explains_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
    model: type[nn.Module],
    training: bool,
    off: float,
    noticed: bool,
) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(model(), ["stage1"], init="perturb", example_input=small.EXAMPLE)
    run = treeify.HierarchicalEnsemble.run

    def broken(own: treeify.HierarchicalEnsemble, x: torch.Tensor, *args: Any) -> torch.Tensor:
        right = run(own, x, *args)
        return right + off if x.dtype == torch.float32 and own.training == training else right

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    if noticed:
        with pytest.raises(treeify.TreeifyError, match=r"tolerance in torch\.float32, though"):
            treeify.verify(hne, small.images(4))
    else:
        mode = "train" if training else "eval"
        assert treeify.verify(hne, small.images(4)).dtypes[mode] == "float64"


def test_what_is_wrong_in_fused_layers_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in float32 only, where float64 could not confirm it."""
    hne = small.ensemble()
    run = treeify.HierarchicalEnsemble.run

    def broken(own: treeify.HierarchicalEnsemble, x: torch.Tensor, *args: Any) -> torch.Tensor:
        right = run(own, x, *args)
        return right + 1e-2 if x.dtype == torch.float32 and args[1].fuse else right

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    with pytest.raises(treeify.TreeifyError, match=r"tolerance in torch\.float32, though"):
        treeify.verify(hne, small.images(4))


def bytes_in_memory() -> int:
    """Of all tensors that Python can find, each storage once."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    dense = (one for one in tensors if not one.is_meta and one.layout is torch.strided)
    storages = (one.untyped_storage() for one in dense)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_check_leaves_no_copies_of_weights_behind() -> None:
    """Graphs refer to themselves: without a thought they keep weights, through the next check."""
    hne = small.ensemble()
    x = small.images()
    gc.collect()
    before = bytes_in_memory()
    gc.disable()
    try:
        treeify.verify(hne, x)
        assert bytes_in_memory() == before > 0
    finally:
        gc.enable()
