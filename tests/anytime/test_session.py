"""Stepping through sizes gives what full calls give, computes nothing twice and holds little."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import small
import torch
from crossings import Pair, PerBranch, Views, convert
from hypothesis import given, settings
from hypothesis import strategies as st
from meters import Macs, Memory
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import treeify
from treeify.engine.plan import Plan, Situation, Tuning
from treeify.engine.program import Walk
from treeify.errors import InputError, LeafError
from treeify.tree import Span

Ensemble = treeify.HierarchicalEnsemble
Splits = tuple[str, ...]

# Bytes per image of the one value that crosses each split; images are the user's.
CROSSING = {"input": 0, "stage1": 8 * 64 * 4, "stage2": 8 * 64 * 4, "head": 8 * 4}
SHAPES: list[Splits] = [
    (),
    ("input:3",),
    ("stage1", "stage2:3"),
    ("input", "stage1:3"),
    ("stage1", "stage2", "head"),
    ("input", "stage1", "stage2", "head:3"),
]


@cache
def _ensemble(splits: Splits) -> Ensemble:
    return small.ensemble(list(splits))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Ensemble, tuple[Splits, list[int]]]:
    """An ensemble that runs whose levels run packed or looped, and increasing sizes."""
    splits = draw(st.sampled_from(SHAPES))
    hne = copy.deepcopy(_ensemble(splits))
    execution = tuple(draw(st.sampled_from(["packed", "looped"])) for _ in range(hne.tree.levels))
    x = small.images()
    situation = Situation.of(x, training=False)
    plan = Plan(execution, draw(st.sampled_from([None, True])), fuse=draw(st.booleans()))
    hne.tunings[situation] = Tuning(situation, plan)
    sizes = draw(st.sets(st.integers(1, hne.leaves), min_size=1))
    return hne, (splits, sorted(sizes))


@contextmanager
def _no_grad_and(mode: TorchDispatchMode) -> Iterator[TorchDispatchMode]:
    with torch.no_grad(), mode:
        yield mode


def _plainly(hne: Ensemble, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = hne.run(x, hne.leaves, Plan(("packed",) * hne.tree.levels))
    return result


def _cached(session: treeify.anytime.session.Session) -> list[Tensor]:
    tensors = []
    for values in session._kept.values():
        for value in values.values():
            parts = value.value if isinstance(value.value, tuple) else (value.value,)
            tensors += [leaf for part in parts for leaf in tree_leaves(part)]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


@settings(max_examples=20)
@given(situations())
def test_stepping_equals_full_calls(example: tuple[Ensemble, tuple[Splits, list[int]]]) -> None:
    hne, (splits, sizes) = example
    x = small.images()
    before = x.clone()
    full = _plainly(hne, x)
    bytes_above = [CROSSING[split.partition(":")[0]] for split in splits]
    session = hne.session(x)
    assert (session.leaves, session.macs, session.elapsed, session.cached_bytes) == (0, 0, 0, 0)
    for size in sizes:
        answer = session.advance(to=size)
        assert (answer.leaves, session.leaves, session.done) == (size, size, size == hne.leaves)
        assert_close(session.leaf_logits, full[:, :size], rtol=1e-4, atol=1e-5)
        assert_close(answer.logits, hne.predict(x, leaves=size).detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(answer.logits, session.logits)
        assert answer.macs == session.macs == hne.count_macs(size)
        assert answer.elapsed == session.elapsed
        expected = sum(
            len(x) * bytes_above[level]
            for level in range(hne.tree.levels - 1)
            if size % hne.tree.leaves_below(level)
        )
        assert session.cached_bytes == expected
    assert torch.equal(x, before)
    assert not session.leaf_logits.requires_grad


@settings(max_examples=20)
@given(situations())
def test_nothing_is_computed_twice(example: tuple[Ensemble, tuple[Splits, list[int]]]) -> None:
    hne, (_, sizes) = example
    x = small.images()
    with _no_grad_and(Macs()) as stepwise:
        session = hne.session(x)
        for size in sizes:
            session.advance(to=size)
    with _no_grad_and(Macs()) as at_once:
        hne.run(x, sizes[-1], Plan(("packed",) * hne.tree.levels))
    base = sum(node.macs * hne.tree.branch_count(sizes[-1])[node.level] for node in _products(hne))
    assert stepwise.total == at_once.total == len(x) * base


def _products(hne: Ensemble) -> list[Any]:
    kinds = ("Conv2d", "Linear")
    return [node for node in hne.conversion.nodes if node.operation in kinds]


def test_going_on_calls_every_level_once_where_all_run_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hne, x = _ensemble(("stage1", "stage2", "head")), small.images()
    calls: list[tuple[int, tuple[int, int]]] = []
    call = Walk.call

    def counted(self: Walk, level: int, span: Span, values: Any) -> Any:
        calls.append((level, tuple(span)))
        return call(self, level, span, values)

    monkeypatch.setattr(Walk, "call", counted)
    session = hne.session(x)
    session.advance(to=1)
    calls.clear()
    session.advance(to=7)
    assert calls == [(1, (1, 2)), (2, (1, 4)), (3, (1, 7))]
    calls.clear()
    session.advance(to=8)
    assert calls == [(3, (7, 8))]


@pytest.mark.parametrize("execution", ["packed", "looped"])
def test_stepping_needs_no_more_memory_than_one_packed_call(execution: str) -> None:
    hne = small.ensemble(["stage1", "stage2:3", "head"])
    x = torch.randn(4, 3, 16, 16)
    _plainly(hne, x)
    with Memory() as at_once:
        _plainly(hne, x)
    assert at_once.now == 0
    hne.execution = execution
    for sizes in (hne.tree.nested_sizes, range(1, 13), (5, 11, 12), (6, 12), (7, 12), (11,)):
        cached = 0
        with Memory() as stepwise:
            session = hne.session(x)
            for size in sizes:
                session.advance(to=size)
                cached = max(cached, session.cached_bytes)
        assert 0 < stepwise.peak <= at_once.peak + cached, sizes


def test_the_memory_meter_sees_what_is_alive() -> None:
    with Memory() as meter, torch.no_grad():
        x = torch.zeros(1000)
        y = x + 1
        view = y[:10]
        assert meter.now == 8000
        del x, y
        assert meter.now == 4000
        del view
        assert (meter.now, meter.peak) == (0, 8000)


@pytest.mark.parametrize("execution", ["packed", "looped"])
@pytest.mark.parametrize("model", [small.SmallNet, Views, PerBranch, Pair])
def test_cached_tensors_share_no_memory(model: type[nn.Module], execution: str) -> None:
    hne, x = convert(model(), ["stage1:3", "stage2", "head"]), small.images()
    hne.execution = execution
    full = _plainly(hne, x)
    for sizes in (range(1, 13), (5, 7, 12)):
        session = hne.session(x)
        for size in sizes:
            session.advance(to=size)
            cached = {id(tensor): tensor for tensor in _cached(session)}.values()
            for tensor in cached:
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                assert len(tensor) == len(x)
            size_in_bytes = sum(tensor.numel() * tensor.element_size() for tensor in cached)
            assert session.cached_bytes == size_in_bytes
            assert (size_in_bytes == 0) == session.done
            assert_close(session.leaf_logits, full[:, :size], rtol=1e-4, atol=1e-5)


def test_images_are_let_go_when_no_later_level_reads_them() -> None:
    for splits, holds in ((["stage1"], False), (["input"], True)):
        session = small.ensemble(splits).session(small.images())
        session.advance()
        assert bool(session._start) is holds
        session.advance()
        assert not session._start


def test_without_a_size_a_step_goes_to_the_next_nested_one() -> None:
    hne, x = small.ensemble(), small.images()
    session = hne.session(x)
    sizes = []
    while not session.done:
        sizes.append(session.advance().leaves)
    assert tuple(sizes) == hne.tree.nested_sizes
    other = hne.session(x)
    other.advance(to=2)
    assert other.advance().leaves == 3


def test_the_generator_steps_through_sizes() -> None:
    hne, x = small.ensemble(), small.images()
    answers = list(hne.anytime(x))
    assert tuple(answer.leaves for answer in answers) == hne.tree.nested_sizes
    assert [answer.leaves for answer in hne.anytime(x, [2, 5])] == [2, 5]
    for answer in answers:
        assert_close(answer.logits, hne.predict(x, leaves=answer.leaves).detach())
    assert all(a.elapsed < b.elapsed and a.macs < b.macs for a, b in pairwise(answers))
    assert answers[-1].macs == hne.count_macs()


@pytest.mark.parametrize("sizes", [[3, 1], [1, 1, 3], [0, 1], [1, 7], [2.0]])
def test_sizes_that_do_not_increase_or_exist(sizes: list[Any]) -> None:
    with pytest.raises(LeafError):
        list(small.ensemble().anytime(small.images(), sizes))


def test_steps_that_cannot_be_taken_change_nothing() -> None:
    hne, x = small.ensemble(), small.images()
    session = hne.session(x)
    with pytest.raises(LeafError, match="no leaf is computed"):
        _ = session.logits
    with pytest.raises(LeafError, match="no leaf is computed"):
        _ = session.leaf_logits
    session.advance(to=4)
    before = session.logits
    for size in (3, 0, -1, 7, True, 5.0):
        with pytest.raises(LeafError):
            session.advance(to=size)  # type: ignore[arg-type]
    assert session.leaves == 4
    assert torch.equal(session.logits, before)
    assert torch.equal(session.advance(to=4).logits, before)
    session.advance(to=6)
    with pytest.raises(LeafError, match="all 6 leaves are computed"):
        session.advance()
    assert_close(session.logits, hne.predict(x).detach())


def test_a_step_that_fails_can_be_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hne, x = small.ensemble(), small.images()
    session = hne.session(x)
    session.advance(to=2)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", _interrupt)
        patch.setattr(torch, "baddbmm", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.advance(to=5)
    assert_close(session.advance(to=5).logits, hne.predict(x, leaves=5).detach())


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_training_mode_and_wrong_inputs_are_refused() -> None:
    hne = small.ensemble()
    with pytest.raises(InputError, match=r"shape \[N, 3, 8, 8\]"):
        hne.session(torch.zeros(2, 4, 8, 8))
    with pytest.raises(InputError, match=r"hne\.eval"):
        hne.train().session(small.images())
    with pytest.raises(InputError, match=r"hne\.eval"):
        next(hne.anytime(small.images()))


@pytest.mark.parametrize("execution", ["packed", "looped"])
def test_models_with_several_outputs(execution: str) -> None:
    class Several(small.SmallNet):
        def forward(self, x: Tensor) -> dict[str, Any]:
            logits = super().forward(x)
            return {"logits": logits, "pair": (logits.softmax(-1), logits.amax(-1)), "classes": 5}

    hne, x = convert(Several()), small.images()
    hne.execution = execution
    session = hne.session(x)
    for size in (1, 3, 4):
        session.advance(to=size)
        expected, mean = hne(x, leaves=size), hne.predict(x, leaves=size)
        for output, value in ((session.leaf_logits, expected), (session.logits, mean)):
            assert output["classes"] == 5
            assert_close(output["logits"], value["logits"].detach())
            assert_close(output["pair"], tuple(part.detach() for part in value["pair"]))
    session = hne.session(x)
    session.advance(to=1)
    session.select(torch.tensor([1]))
    session.advance(to=4)
    assert_close(session.logits["pair"][1], hne.predict(x[1:])["pair"][1].detach())


def test_sessions_do_not_disturb_each_other() -> None:
    hne = small.ensemble()
    inputs = [small.images(2, seed=seed) for seed in (1, 2)]
    sessions = [hne.session(x) for x in inputs]
    for size in (1, 4, 6):
        for session in sessions:
            session.advance(to=size)
    for x, session in zip(inputs, sessions, strict=True):
        assert_close(session.logits, hne.predict(x).detach())
    assert prod(sessions[0].logits.shape) == 2 * small.CLASSES
