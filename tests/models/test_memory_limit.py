"""A model may take as much memory as its saved tensors explain."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from treeify.errors import ModelError
from treeify.models.memory_limit import MemoryLimit

LARGE = 10**9
TOO_LARGE: dict[str, Callable[[], object]] = {
    "layer": lambda: nn.Linear(LARGE, 1),
    "zeros": lambda: torch.zeros(LARGE),
    "size in a tuple": lambda: torch.ones((LARGE, 1)),
    "size by name": lambda: torch.empty(size=(LARGE,)),
    "shape": lambda: torch.zeros(torch.Size([LARGE])),
    "filled": lambda: torch.full((LARGE,), 0.5),
    "numbers": lambda: torch.arange(LARGE),
    "steps": lambda: torch.linspace(0, 1, LARGE),
    "all pairs": lambda: torch.zeros(40_000, 1) - torch.zeros(1, 40_000),
    "together": lambda: [torch.empty(2**24) for _ in range(100)],
    "many": lambda: [torch.empty(1) for _ in range(10**5)],
}


@pytest.mark.parametrize("allocate", TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_the_weights_do_not_explain_is_refused_before_it_is_allocated(
    allocate: Callable[[], object],
) -> None:
    with MemoryLimit(1000, 10), pytest.raises(ModelError, match="far more memory than its saved"):
        allocate()


def test_what_they_explain_is_not() -> None:
    def work() -> Tensor:
        return torch.full((3,), -100) + torch.zeros(1000, 1) @ torch.zeros(1, 3)

    with MemoryLimit(2**28, 10):
        nn.Linear(2**14, 2**13, device="meta")
        torch.empty(2**40, device="meta")
        for _ in range(1000):
            torch.empty(()).add(torch.ones(2))
        assert work().shape == (1000, 3)
