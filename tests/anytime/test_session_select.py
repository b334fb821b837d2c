"""Images may leave a session; the others' answers are as if they had never been there."""

from functools import cache
from typing import Any

import pytest
import small
import torch
from crossings import Gates, Pair, PerBranch, Views, convert
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import treeify
from treeify.errors import InputError


@pytest.mark.parametrize("execution", ["packed", "looped"])
@pytest.mark.parametrize("model", [small.SmallNet, Views, PerBranch, Pair, Gates])
@settings(max_examples=6)
@given(data=st.data())
def test_kept_images_go_on_as_if_alone(model: type[nn.Module], execution: str, data: Any) -> None:
    hne = _kept_model(model)
    hne.execution = execution
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
def _kept_model(model: type[nn.Module]) -> treeify.HierarchicalEnsemble:
    return convert(model(), ["stage1", "stage2:3"])


def test_all_images_may_leave() -> None:
    session = small.ensemble().session(small.images())
    session.advance(to=1)
    session.select(torch.zeros(0, dtype=torch.long))
    assert session.advance(to=6).logits.shape == (0, small.CLASSES)


@pytest.mark.parametrize("leaves", [0, 1])
def test_images_are_kept_by_a_mask_or_a_list_of_positions(leaves: int) -> None:
    hne, x = small.ensemble(), small.images(5)
    mask = torch.tensor([True, False, False, True, True])
    for images, remaining in (
        (mask, x[mask]),
        ([4, 0], x[[4, 0]]),
        (torch.tensor([1]).int(), x[1:2]),
    ):
        session = hne.session(x)
        if leaves:
            session.advance(to=leaves)
        session.select(images)
        assert_close(session.advance(to=6).logits, hne.predict(remaining).detach())
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
    hne, x = convert(model()), small.images(3)
    session = hne.session(x)
    session.advance(to=1)
    assert not session.droppable
    with pytest.raises(InputError, match="cannot leave"):
        session.select(torch.tensor([0]))
    session.advance(to=4)
    expected = hne.predict(x)
    for one, other in zip(tree_leaves(session.logits), tree_leaves(expected), strict=True):
        assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)
