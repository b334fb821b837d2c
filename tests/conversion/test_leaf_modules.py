"""What closed modules do to their tensors: every branch keeps its own, as a network alone would."""

import pytest
import small
import torch
from leaf_modules import Counting
from torch import Tensor, nn
from torch.testing import assert_close

import treeify


class Averaging(nn.Module):
    """Assigns to a buffer that the output was computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        self.register_buffer("scale", torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * self.scale
        if self.training:
            self.scale = 0.5 * self.scale + 2 * x.detach().abs().mean((0, 2, 3))[:, None, None]
        return x


class Shrinking(nn.Module):
    """Exchanges a weight's data, behind control flow that keeps it closed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = -x
        self.conv.weight.data = self.conv.weight.data * 0.5
        return self.conv(x)


class Model(nn.Module):
    def __init__(self, closed: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.closed, self.head = nn.Conv2d(3, 8, 1), closed(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.closed(self.stem(x)).mean((2, 3)))


def with_leaf_module(kind: type[nn.Module], split: str = "closed") -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    hne = small.converted(Model(kind), [split])
    assert list(hne.traced.leaf_modules) == ["closed"]
    return hne


def assert_same_state(hne: treeify.HierarchicalEnsemble, networks: list[nn.Module]) -> None:
    for index, network in enumerate(networks):
        assert_close(hne.leaf(index).state_dict(), network.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("split", ["stem", "closed", "head"])
@pytest.mark.parametrize("closed", [Averaging, Counting, Shrinking])
def test_every_branch_keeps_its_own(closed: type[nn.Module], split: str, training: bool) -> None:
    hne = with_leaf_module(closed, split)
    assert treeify.verify(hne, small.images(2)).worst <= 1
    networks = [hne.leaf(index).train(training) for index in range(hne.leaves)]
    hne.train(training)
    for step in range(3):
        x = small.images(2) + step
        logits = hne(x)
        logits.square().sum().backward()
        for index, network in enumerate(networks):
            own = network(x)
            assert_close(logits[:, index], own, rtol=1e-4, atol=1e-5)
            own.square().sum().backward()
    # The closed module is shared where the split comes after it: its averages see one branch.
    assert_same_state(hne, networks)
    if split != "head":
        gradient = hne.get_parameter("closed.conv.weight").grad
        for index, network in enumerate(networks):
            own = network.get_parameter("closed.conv.weight").grad
            assert_close(hne.part("closed.conv.weight", index, gradient), own)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_assigned_buffers_are_kept_under_compile() -> None:
    hne = with_leaf_module(Averaging).train()
    networks = [hne.leaf(index) for index in range(hne.leaves)]
    compiled = torch.compile(hne, backend="eager")
    for network in (compiled, *networks):
        network(small.images(2))
    assert_same_state(hne, networks)


@pytest.mark.parametrize("training", [True, False])
def test_tuning_leaves_assigned_buffers_alone(training: bool) -> None:
    hne = with_leaf_module(Counting).train(training)
    before = {key: own.clone() for key, own in hne.state_dict().items()}
    hne.tune(small.images(2), repeats=1, budget=0.1)
    assert_close(hne.state_dict(), before)
