"""Stepping through sizes gives what full calls give, computes nothing twice and holds little."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any
from weakref import finalize

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    """An ensemble that runs in some way, and increasing sizes."""
    splits = draw(st.sampled_from(SHAPES))
    hne = copy.deepcopy(_ensemble(splits))
    ways = tuple(draw(st.sampled_from(["packed", "looped"])) for _ in range(hne.tree.levels))
    x = small.images()
    situation = Situation.of(x, training=False)
    plan = Plan(ways, draw(st.sampled_from([None, True])), fuse=draw(st.booleans()))
    hne.tunings[situation] = Tuning(situation, plan)
    sizes = draw(st.sets(st.integers(1, hne.leaves), min_size=1))
    return hne, (splits, sorted(sizes))


class Macs(TorchDispatchMode):
    """Counts the multiply-accumulates of convolutions and matrix products as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "convolution" in name:
            self.total += result.numel() * (args[1].numel() // result.shape[1])
        elif name in ("mm", "bmm"):
            self.total += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.total += args[1].numel() * args[2].shape[-1]
        return result


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive; their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, before)
        return result

    def _note(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.live:
            if key in before:
                return  # a view of a parameter or of the user's images
            self.live[key] = [0, size]
            self.now += size
            self.peak = max(self.peak, self.now)
        self.live[key][0] += 1
        finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self.live[key]


@contextmanager
def _no_grad_and(mode: TorchDispatchMode) -> Iterator[TorchDispatchMode]:
    with torch.no_grad(), mode:
        yield mode


def _plainly(hne: Ensemble, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = hne.run(x, hne.leaves, Plan(("packed",) * hne.tree.levels))
    return result


def _held(session: treeify.anytime.session.Session) -> list[Tensor]:
    held = (held.value for values in session._kept.values() for held in values.values())
    tensors = []
    for value in held:
        parts = value if isinstance(value, tuple) else (value,)
        tensors += [leaf for part in parts for leaf in tree_leaves(part)]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _convert(model: nn.Module, splits: list[str] | None = None) -> Ensemble:
    torch.manual_seed(0)
    return treeify.hierarchicalize(
        model, splits or ["stage1", "stage2"], init="perturb", example_input=small.EXAMPLE
    ).eval()


@settings(max_examples=20)
@given(situations())
def test_stepping_equals_full_calls(example: tuple[Ensemble, tuple[Splits, list[int]]]) -> None:
    hne, (splits, sizes) = example
    x = small.images()
    given_images = x.clone()
    whole = _plainly(hne, x)
    bytes_above = [CROSSING[split.partition(":")[0]] for split in splits]
    session = hne.session(x)
    assert (session.leaves, session.macs, session.elapsed, session.cached_bytes) == (0, 0, 0, 0)
    for size in sizes:
        step = session.advance(to=size)
        assert (step.leaves, session.leaves, session.done) == (size, size, size == hne.leaves)
        assert_close(session.leaf_logits, whole[:, :size], rtol=1e-4, atol=1e-5)
        assert_close(step.logits, hne.predict(x, leaves=size).detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(step.logits, session.logits)
        assert step.macs == session.macs == hne.count_macs(size)
        assert step.elapsed == session.elapsed
        expected = sum(
            len(x) * bytes_above[level]
            for level in range(hne.tree.levels - 1)
            if size % hne.tree.leaves_below(level)
        )
        assert session.cached_bytes == expected
    assert torch.equal(x, given_images)
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
    call = Walk._call

    def counted(self: Walk, level: int, span: Span, held: Any) -> Any:
        calls.append((level, tuple(span)))
        return call(self, level, span, held)

    monkeypatch.setattr(Walk, "_call", counted)
    session = hne.session(x)
    session.advance(to=1)
    calls.clear()
    session.advance(to=7)
    assert calls == [(1, (1, 2)), (2, (1, 4)), (3, (1, 7))]
    calls.clear()
    session.advance(to=8)
    assert calls == [(3, (7, 8))]


@pytest.mark.parametrize("way", ["packed", "looped"])
def test_stepping_needs_no_more_memory_than_one_packed_call(way: str) -> None:
    hne = small.ensemble(["stage1", "stage2:3", "head"])
    x = torch.randn(4, 3, 16, 16)
    _plainly(hne, x)
    with Memory() as whole:
        _plainly(hne, x)
    assert whole.now == 0
    hne.execution = way
    for sizes in (hne.tree.nested_sizes, range(1, 13), (5, 11, 12), (6, 12), (7, 12), (11,)):
        cached = 0
        with Memory() as stepwise:
            session = hne.session(x)
            for size in sizes:
                session.advance(to=size)
                cached = max(cached, session.cached_bytes)
        assert 0 < stepwise.peak <= whole.peak + cached, sizes


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


class Views(small.SmallNet):
    """What crosses splits are views of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x).chunk(2, 1)[0])
        x = self.stage2(x.chunk(2, 1)[1])
        return self.head(x.mean((2, 3)))


class PerBranch(small.SmallNet):
    """What crosses splits runs per branch, since no rule knows how it packs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        spectrum = torch.fft.fft(x).real
        x = self.stage2(x) + spectrum
        return self.head(x.mean((2, 3)) + spectrum[:, :, 0, 0])


class Pair(small.SmallNet):
    """A tuple crosses, and one value jumps a level."""

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        left, right = self.stage1(stem).chunk(2, 1)
        x = self.stage2(torch.cat((right, left), 1)) + stem
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("way", ["packed", "looped"])
@pytest.mark.parametrize("model", [small.SmallNet, Views, PerBranch, Pair])
def test_cached_tensors_own_their_memory(model: type[nn.Module], way: str) -> None:
    hne, x = _convert(model(), ["stage1:3", "stage2", "head"]), small.images()
    hne.execution = way
    whole = _plainly(hne, x)
    for sizes in (range(1, 13), (5, 7, 12)):
        session = hne.session(x)
        for size in sizes:
            session.advance(to=size)
            held = {id(tensor): tensor for tensor in _held(session)}.values()
            for tensor in held:
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                assert len(tensor) == len(x)
            own = sum(tensor.numel() * tensor.element_size() for tensor in held)
            assert session.cached_bytes == own
            assert (own == 0) == session.done
            assert_close(session.leaf_logits, whole[:, :size], rtol=1e-4, atol=1e-5)


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
    found = list(hne.anytime(x))
    assert tuple(step.leaves for step in found) == hne.tree.nested_sizes
    assert [step.leaves for step in hne.anytime(x, [2, 5])] == [2, 5]
    for step in found:
        assert_close(step.logits, hne.predict(x, leaves=step.leaves).detach())
    assert all(a.elapsed < b.elapsed and a.macs < b.macs for a, b in pairwise(found))
    assert found[-1].macs == hne.count_macs()


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


@pytest.mark.parametrize("way", ["packed", "looped"])
def test_models_with_several_outputs(way: str) -> None:
    class Several(small.SmallNet):
        def forward(self, x: Tensor) -> dict[str, Any]:
            logits = super().forward(x)
            return {"logits": logits, "pair": (logits.softmax(-1), logits.amax(-1)), "classes": 5}

    hne, x = _convert(Several()), small.images()
    hne.execution = way
    session = hne.session(x)
    for size in (1, 3, 4):
        session.advance(to=size)
        expected, mean = hne(x, leaves=size), hne.predict(x, leaves=size)
        for found, value in ((session.leaf_logits, expected), (session.logits, mean)):
            assert found["classes"] == 5
            assert_close(found["logits"], value["logits"].detach())
            assert_close(found["pair"], tuple(part.detach() for part in value["pair"]))
    session = hne.session(x)
    session.advance(to=1)
    session.select(torch.tensor([1]))
    session.advance(to=4)
    assert_close(session.logits["pair"][1], hne.predict(x[1:])["pair"][1].detach())


class Gates(small.SmallNet):
    """Numbers per image, [N], cross levels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = x.mean((1, 2, 3))
        x = self.stage1(x) * first[:, None, None, None]
        second = x.mean((2, 3))[:, 0].sigmoid() + first
        x = self.stage2(x) + x
        return self.head(x.mean((2, 3)) * second[:, None])


@pytest.mark.parametrize("way", ["packed", "looped"])
@pytest.mark.parametrize("model", [small.SmallNet, Views, PerBranch, Pair, Gates])
@settings(max_examples=6)
@given(data=st.data())
def test_kept_images_go_on_as_if_alone(model: type[nn.Module], way: str, data: Any) -> None:
    hne = _kept_model(model)
    hne.execution = way
    x = small.images(5)
    present = torch.arange(5)
    session = hne.session(x)
    sizes = sorted(data.draw(st.sets(st.integers(1, 6), min_size=1)))
    for size in sizes:
        chosen = data.draw(
            st.lists(st.integers(0, len(present) - 1), min_size=1, max_size=5, unique=True)
        )
        images = torch.tensor(chosen)
        session.select(images)
        present = present[images]
        if session.leaves:
            assert len(session.logits) == len(present)
        session.advance(to=size)
        expected = hne(x[present], leaves=size).detach()
        assert_close(session.leaf_logits, expected, rtol=1e-4, atol=1e-5)
        assert session.macs == hne.count_macs(size)


@cache
def _kept_model(model: type[nn.Module]) -> Ensemble:
    return _convert(model(), ["stage1", "stage2:3"])


def test_all_images_may_leave() -> None:
    session = small.ensemble().session(small.images())
    session.advance(to=1)
    session.select(torch.zeros(0, dtype=torch.long))
    assert session.advance(to=6).logits.shape == (0, small.CLASSES)


@pytest.mark.parametrize("leaves", [0, 1])
def test_images_are_kept_by_a_mask_or_a_list_of_positions(leaves: int) -> None:
    hne, x = small.ensemble(), small.images(5)
    mask = torch.tensor([True, False, False, True, True])
    for images, kept in ((mask, x[mask]), ([4, 0], x[[4, 0]]), (torch.tensor([1]).int(), x[1:2])):
        session = hne.session(x)
        if leaves:
            session.advance(to=leaves)
        session.select(images)
        assert_close(session.advance(to=6).logits, hne.predict(kept).detach())
        session.select([])
        assert session.logits.shape == (0, small.CLASSES)


@pytest.mark.parametrize(
    "images",
    [
        *(torch.ones(4).bool(), torch.ones(6).bool(), torch.ones(5, 1).bool()),
        *([5], [-1], [0.5], [[0, 1]], torch.tensor(0), torch.zeros(5), torch.zeros(0, 2)),
    ],
    ids=str,
)
def test_what_names_no_images_is_refused_and_changes_nothing(images: Any) -> None:
    hne, x = small.ensemble(), small.images(6)
    session = hne.session(x)
    session.advance(to=1)
    session.select(range(5))
    with pytest.raises(InputError, match=r"from 0 to 4, \[M\] integers, or \[5\] booleans"):
        session.select(images)
    assert_close(session.advance(to=6).logits, hne.predict(x[:5]).detach())


class CountsImages(small.SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        count = x.shape[0]
        x = self.stage1(x)
        x = self.stage2(x.reshape(count, 8, 8, 8))
        return self.head(x.mean((2, 3)))


class MergesImages(small.SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.stage2 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        rows = self.stage2(x.flatten(2).transpose(1, 2).flatten(0, 1))
        return self.head(rows.unflatten(0, (-1, 64)).mean(1))


class AnswersForAll(small.SmallNet):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits.abs().mean()


@pytest.mark.parametrize("model", [CountsImages, MergesImages, AnswersForAll])
def test_images_cannot_leave_where_a_value_counts_or_mixes_them(model: type[nn.Module]) -> None:
    hne, x = _convert(model()), small.images(3)
    session = hne.session(x)
    session.advance(to=1)
    assert not session.droppable
    with pytest.raises(InputError, match="cannot leave"):
        session.select(torch.tensor([0]))
    session.advance(to=4)
    expected = hne.predict(x)
    found = session.logits
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


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
