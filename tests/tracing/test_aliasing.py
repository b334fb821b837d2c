"""Values in one memory, of which one is changed in place."""

import pytest
import small
import torch
from torch import Tensor, nn

import treeify
from treeify.errors import TraceError


class Aliasing(nn.Module):
    """Values that lie in one another's memory while one of them is changed in place.

    Args:
        case: what is changed and what is read afterwards.
    """

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.same = nn.Identity()
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + 0.1
        if self.case == "identity":
            other = self.same(x).relu_()
        elif self.case == "identity, the other way":
            other = self.same(x)
            x.relu_()
        elif self.case == "dropout and contiguous":
            other = nn.functional.dropout(x, 0.5, self.training).contiguous()
            x = x.mul_(0.5) if not self.training else x
        elif self.case == "narrow":
            first, second = x.narrow(1, 0, 2), x.narrow(1, 2, 2)
            first.mul_(2.0)
            x = other = torch.cat((first, second), dim=1)
        elif self.case == "slices":
            other, rest = x[:, :2], x[:, 2:]
            rest.add_(1.0)
            x = other = torch.cat((other, rest), dim=1)
        elif self.case == "a part":
            other = x[:, 1:].repeat(1, 2, 1, 1)[:, :4] + 1
            part = x[:, :3]
            x.add_(1.0)
            other = other + part.sum(1, keepdim=True)
        else:
            part, other = x[:, :3], x[:, 2:]
            part.add_(1.0)
            x = other = torch.cat((part, other), dim=1)[:, :4]
        return self.head((self.body(x) + other).mean((2, 3)))


@pytest.mark.parametrize(
    "case",
    ["identity", "identity, the other way", "dropout and contiguous", "narrow", "slices"],
)
def test_values_of_one_memory_change_together_or_not_at_all(case: str) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Aliasing(case), ["body"], init="perturb", example_input=small.EXAMPLE
    )
    assert treeify.verify(hne, small.images(2)).worst <= 1


@pytest.mark.parametrize("case", ["a part", "overlapping parts"])
def test_a_part_of_what_is_changed_in_place_must_not_be_read_later(case: str) -> None:
    with pytest.raises(TraceError, match=r"in place, and getitem.* with it, which .* afterwards"):
        treeify.hierarchicalize(Aliasing(case), ["body"], init="fresh", example_input=small.EXAMPLE)
