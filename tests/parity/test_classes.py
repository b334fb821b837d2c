"""The smallest model of every class timm and torchvision have, each split in two and proven."""

from collections.abc import Iterator

import model_classes
import pytest
import torch

import treeify
from treeify.parity import results
from treeify.parity.fresh_weights import settle

# One class in so many is run by default, all of them on CI.
_BY_DEFAULT = 8


def _cases() -> Iterator[object]:
    for position, case in enumerate(model_classes.CASES):
        marks = [pytest.mark.thorough] if position % _BY_DEFAULT else []
        yield pytest.param(case, id=f"{case.network}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", list(_cases()))
def test_a_model_of_every_class_is_exactly_right(case: model_classes.Case) -> None:
    """In float64, where rounding hides nothing: leaves, prefixes, statistics and gradients."""
    torch.manual_seed(0)
    base = case.architecture.build()
    assert type(base).__name__ == case.network
    settle(base)
    hne = treeify.hierarchicalize(
        base, 1, init="perturb", example_input=torch.zeros(1, 3, case.size, case.size)
    )
    del base  # the largest takes half a GB
    x = torch.rand(2, 3, case.size, case.size, dtype=torch.float64)
    figures = treeify.verify(hne.double(), x)
    assert figures.worst <= 1
    assert set(figures.dtypes.values()) == {"float64"}


def test_no_class_is_left_out() -> None:
    """As far as the rows that treeify ships know classes."""
    known = {(case.library, case.network) for case in model_classes.CASES}
    for row in results.shipped().newest().values():
        library = "torchvision" if row.name.startswith("torchvision/") else "timm"
        assert (library, row.network) in known, row.name
