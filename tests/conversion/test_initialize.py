"""Where the branches' first weights come from."""

import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify


def test_initialisations_differ_as_they_say() -> None:
    x = small.images()
    fresh, copied = small.ensemble(init="fresh"), small.ensemble(init="copy")
    noisy = small.ensemble(init="perturb")
    torch.manual_seed(0)
    base = small.SmallNet().eval()
    assert fresh(x).std(dim=1).min() > 0
    assert_close(copied(x), base(x)[:, None].expand(-1, 6, -1))
    assert torch.equal(noisy.leaf(0)(x), base(x))
    assert not torch.allclose(noisy(x)[:, 0], noisy(x)[:, 1])
    weight, noise = base.stage2[0].weight, noisy.leaf(1).stage2[0].weight
    relative = (noise - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert 0.07 < relative < 0.13


def test_same_seed_same_weights_and_branches_depend_on_nothing_else() -> None:
    one, two, other = (small.ensemble(init="fresh", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    wider = small.ensemble(["stage1:3", "stage2:3"], init="fresh", seed=3)
    branches = one.head.weight.shape[0]
    assert torch.equal(wider.head.weight[:branches], one.head.weight)


class Constant(nn.Sequential):
    """Initialises its layer by itself, after the layer did."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self[0].weight, 0.05)


class Asking(nn.Linear):
    """Cannot initialise itself without being told how."""

    def reset_parameters(self, scale: float = 0.1) -> None:
        nn.init.constant_(self.weight, scale)


class Demanding(nn.Module):
    """The same, and has no default."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 1))

    def reset_parameters(self, scale: float) -> None:
        nn.init.constant_(self.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_modules_own_scheme_comes_after_those_of_its_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Constant(nn.Conv2d(3, 4, 3)), Demanding(), nn.Flatten(), Asking(4 * 36, 2)
    )
    hne = treeify.hierarchicalize(model, ["input"], init="fresh", example_input=small.EXAMPLE)
    for leaf in range(hne.leaves):
        own = hne.leaf(leaf)
        assert (own[0][0].weight == 0.05).all()
        assert own[0][0].bias.std() > 0
        assert (own[3].weight == 0.1).all()
    assert any("1" in note and "perturbed by" in note for note in hne.conversion.notes)


def test_modules_that_cannot_initialise_themselves_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    class Net(small.SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scaled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(super().forward(x))

    hne = treeify.hierarchicalize(Net(), ["stage1"], init="fresh", example_input=small.EXAMPLE)
    assert any("perturbed by 0.1" in note and "scale" in note for note in hne.conversion.notes)
    assert not torch.equal(hne.leaf(0).scale.gain, hne.leaf(1).scale.gain)
