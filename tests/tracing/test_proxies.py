"""Values as the model's code sees them while it is traced."""

from typing import Any

import pytest
import small
import torch
from torch import Tensor, fx, nn

from treeify.conversion.assemble import trace_model
from treeify.errors import TraceError


class Asking(nn.Module):
    """Lets a function look at its activations, `[N, 4, 8, 8]`, on the way to `[N, 4]`."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        LOOKS[self.look](x)
        return x.mean((2, 3))


SEEN: list[Any] = []
LOOKS: dict[str, Any] = {
    "rank": lambda x: SEEN.append((x.ndim, x.dim())),
    "kind": lambda x: SEEN.append(
        (isinstance(x, Tensor), isinstance(x, int | Tensor), isinstance(x.shape, Tensor))
    ),
    "in place": lambda x: SEEN.append(x.__iadd__(1).node.target.__name__),
    "factory": lambda x: SEEN.append(isinstance(torch.zeros(x.shape[0], 2), fx.Proxy)),
}
ANSWERS = {"rank": (4, 4), "kind": (True, True, False), "in place": "iadd", "factory": True}


@pytest.mark.parametrize("look", ANSWERS)
def test_values_answer_as_tensors_and_leave_the_size_open(look: str) -> None:
    SEEN.clear()
    traced = trace_model(Asking(look), example_input=small.EXAMPLE)
    assert SEEN
    assert all(answer == ANSWERS[look] for answer in SEEN)
    assert not traced.limits.one_size


def test_nothing_is_patched_afterwards() -> None:
    before = isinstance, torch.zeros, torch.autograd.Function.apply
    trace_model(Asking("kind"), example_input=small.EXAMPLE)
    assert (isinstance, torch.zeros, torch.autograd.Function.apply) == before


def exchange_data(x: Tensor) -> None:
    x.data = torch.zeros(())


def test_data_are_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOOKS, "data", exchange_data)
    with pytest.raises(TraceError, match="assigns to a tensor's data"):
        trace_model(Asking("data"), example_input=small.EXAMPLE)
