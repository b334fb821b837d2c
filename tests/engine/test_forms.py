"""Every form has the same values; conversions between them lose nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from treeify.engine.forms import (
    Branches,
    Convert,
    Form,
    Leaves,
    Multiply,
    children,
    join,
    pack,
    pick,
    read_once,
    unpack,
)
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span

IMAGES = TensorFacts((2, 4, 3, 3), batched=True, batch_dim=0)
# Windows grow in another dim, and are no rows of images; sizes of the batch are no tensors.
WINDOWS = TensorFacts((5, 2, 4), batched=False, batch_dim=1)
SCALAR = TensorFacts((), batched=False, batch_dim=None)
FACTS = {"images": IMAGES, "rest": (WINDOWS, SCALAR, None)}
FORMS = [Form.PACKED, Form.BATCH]


def _branches(count: int) -> Branches:
    generator = torch.Generator().manual_seed(0)

    def value() -> dict[str, Any]:
        tensors = (torch.randn(fact.shape, generator=generator) for fact in (WINDOWS, SCALAR))
        return {"images": torch.randn(IMAGES.shape, generator=generator), "rest": (*tensors, 7)}

    return Branches(value() for _ in range(count))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_packed_can_be_unpacked(form: Form) -> None:
    branches = _branches(3)
    packed = pack(branches, FACTS, form)
    shape = (2, 12, 3, 3) if form is Form.PACKED else (6, 4, 3, 3)
    assert packed["images"].shape == shape
    assert packed["rest"][0].shape == ((3, 5, 2, 4) if form is Form.PACKED else (5, 6, 4))
    assert packed["rest"][1].shape == (3,)
    assert packed["rest"][2] == 7
    again = unpack(packed, FACTS, 3, form)
    assert type(again) is Branches
    assert_close(tuple(again), tuple(branches))
    images = again[1]["images"]
    assert images.untyped_storage().data_ptr() == packed["images"].untyped_storage().data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_neighbouring_spans_are_joined(form: Form) -> None:
    branches = _branches(5)
    parts = [pack(Branches(branches[a:b]), FACTS, form) for a, b in ((0, 2), (2, 5))]
    assert_close(join(parts, form, FACTS), pack(branches, FACTS, form))
    single = unpack(pack(branches, FACTS, form), FACTS, 5, form, unbind=False)
    assert_close(join(single, form, FACTS), pack(branches, FACTS, form))


def test_other_forms_are_joined() -> None:
    assert join([3, 3], Form.SHARED, None) == 3
    assert join([Branches([1, 2]), Branches([3])], Form.BRANCHES, None) == (1, 2, 3)
    leaves = join([torch.zeros(2, 1, 5), torch.ones(2, 3, 5)], Form.LEAVES, None)
    assert leaves.shape == (2, 4, 5)
    assert join([torch.zeros(1), torch.ones(3)], Form.LEAVES, None).shape == (4,)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_no_images_has_branches(form: Form) -> None:
    nothing = torch.zeros(0, 12, 3, 3) if form is Form.PACKED else torch.zeros(0, 4, 3, 3)
    assert [len(branch) for branch in unpack(nothing, IMAGES, 3, form)] == [0] * 3


def test_arguments_of_a_branch_are_picked_in_any_structure() -> None:
    values = Branches("ab")
    arguments = ([values, 1], {"size": slice(values, None)}, torch.Size([2]))
    assert pick(arguments, 1) == (["b", 1], {"size": slice("b", None)}, torch.Size([2]))


def test_children_have_their_parents_values() -> None:
    assert children(Branches("bc"), Span(3, 6), ratio=2) == ("b", "c", "c")


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("source", [*FORMS, Form.BRANCHES])
@pytest.mark.parametrize("target", [*FORMS, Form.BRANCHES])
@pytest.mark.parametrize("ratio", [1, 2])
def test_conversions_keep_every_branch(
    source: Form, target: Form, ratio: int, channels_last: bool
) -> None:
    span = Span(1, 4)
    parents = _branches(span.parents(ratio).size)
    if channels_last:
        for branch in parents:
            branch["images"] = branch["images"].contiguous(memory_format=torch.channels_last)
    value = parents if source is Form.BRANCHES else pack(parents, FACTS, source)
    converted = Convert(FACTS, source, target, ratio)(span, value)
    if target is not Form.BRANCHES:
        converted = unpack(converted, FACTS, span.size, target)
    assert_close(tuple(converted), tuple(children(parents, span, ratio)))


def test_shared_values_become_those_of_every_branch() -> None:
    (value,) = _branches(1)
    packed = Convert(FACTS, Form.SHARED, Form.PACKED, 3)(Span(0, 3), value)
    assert_close(packed, pack(Branches([value] * 3), FACTS))


@pytest.mark.parametrize(
    ("span", "count"), [(Span(0, 4), 2), (Span(2, 4), 1), (Span(1, 4), 3), (Span(3, 4), 1)]
)
def test_siblings_read_one_copy_unless_they_are_cut(span: Span, count: int) -> None:
    parents = Branches(torch.randn(2, 4, 3, 3) for _ in range(span.parents(2).size))
    copies, x = read_once(span, 2, pack(parents, IMAGES), IMAGES)
    assert copies == count
    expected = children(parents, span, 2) if count == 3 else parents
    assert_close(x, pack(Branches(expected), IMAGES))


@pytest.mark.parametrize("form", FORMS)
def test_leaves_are_dim_1(form: Form) -> None:
    branches = _branches(3)
    leaves = Leaves(FACTS, form)(Span(0, 3), pack(branches, FACTS, form))
    for index, branch in enumerate(branches):
        assert_close(leaves["images"][:, index], branch["images"])
        assert_close(leaves["rest"][0][:, index], branch["rest"][0])
        assert leaves["rest"][1][index] == branch["rest"][1]
    assert leaves["rest"][2] == 7


def test_sizes_that_grow_with_the_batch_are_multiplied() -> None:
    sizes: Any = (2, {"rows": 10, "channels": 4})
    multiply = Multiply((True, {"rows": True, "channels": False}))
    assert multiply(Span(0, 3), sizes) == (6, {"rows": 30, "channels": 4})


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("source", "target"), [FORMS, FORMS[::-1]])
def test_images_stay_channels_last_on_the_way_to_the_batch_and_back(
    source: Form, target: Form
) -> None:
    branches = Branches(torch.randn(2, 4, 3, 3) for _ in range(3))
    x = pack(branches, IMAGES, source).contiguous(memory_format=torch.channels_last)
    assert _is_channels_last(Convert(IMAGES, source, target, 1)(Span(0, 3), x))
    x = x.contiguous()
    assert not _is_channels_last(Convert(IMAGES, source, target, 1)(Span(0, 3), x))
