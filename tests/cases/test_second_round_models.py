"""Layers that other converters stumbled over: the second round of cases (README.md)."""

import pytest
import torch
from cases.chains import X, assert_copies, assert_leaves, chain
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DeformConv2d

import treeify
from treeify.errors import TreeifyError


def test_spectral_norm_of_either_kind() -> None:
    model = chain(parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)))
    model(X)
    assert_copies(model)
    old = chain(nn.utils.spectral_norm(nn.Conv2d(8, 8, 3)))
    old(X)
    with pytest.raises(TreeifyError, match="parametrizations"):
        treeify.hierarchicalize(old, ["1"], init="fresh", example_input=X)


class Backbone(nn.Module):
    """Gets no gradients, by a context instead of `requires_grad_`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.body(self.stem(x)).mean((2, 3))


class Frozen(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def test_no_grad_inside_forward_stays() -> None:
    with pytest.raises(TreeifyError, match=r"switches gradients[^$]*self\.body\(self\.stem"):
        treeify.hierarchicalize(Frozen(), ["head"], init="fresh", example_input=X)
    hne = assert_leaves(nn.Sequential(Backbone(), nn.Linear(8, 5)), "1")  # as the message advises
    hne.train()(X).sum().backward()
    trained = {name for name, tensor in hne.named_parameters() if tensor.grad is not None}
    assert trained == {"1.weight", "1.bias"}


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x)


def test_a_straight_through_estimator_keeps_its_gradient() -> None:
    hne = assert_leaves(chain(Binary()))
    hne.train()(X).sum().backward()
    for index in range(2):
        leaf = hne.leaf(index).train()
        leaf(X).sum().backward()
        assert leaf[1].weight.grad.abs().sum() > 0
        gradient = hne.get_parameter("1.weight").grad.chunk(2)[index]
        torch.testing.assert_close(gradient, leaf[1].weight.grad, rtol=1e-4, atol=1e-5)


class Rows(nn.Module):
    """A recurrent network over the rows of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x.mean(3).transpose(1, 2))
        return y.transpose(1, 2)[..., None]


@pytest.mark.parametrize("batch", [1, 7])
def test_a_recurrent_layer_at_another_batch_size(batch: int) -> None:
    assert_leaves(chain(Rows()), x=torch.randn(batch, 3, 16, 16))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv, x, use_reentrant=False) if self.training else self.conv(x)


def test_gradient_checkpointing_switched_on() -> None:
    hne = assert_leaves(chain(Checkpointed()))
    hne.train()(X).sum().backward()
    assert all(tensor.grad is not None for tensor in hne.parameters())


class Noisy(nn.Module):
    """Noise of a size that is written down, not read off the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(1, 8, 1, 1) if self.training else x


def test_noise_is_drawn_anew_in_every_pass() -> None:
    hne = treeify.hierarchicalize(chain(Noisy()), ["1"], init="copy", example_input=X).train()
    one, other = hne(X), hne(X)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1])


class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = F.max_pool2d(self.conv(x), 2, return_indices=True)
        return self.head(F.max_unpool2d(self.body(x), indices, 2)[..., ::3].mean((2, 3)))


def test_indices_of_a_pooling_cross_the_split() -> None:
    assert_leaves(Unpooled(), "body")


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset, self.conv = nn.Conv2d(8, 18, 3, padding=1), DeformConv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x))


def test_a_deformable_convolution() -> None:
    assert_leaves(chain(Deformable()))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None]


def test_torchs_own_transformer_layer_without_gradients() -> None:
    hne = assert_leaves(chain(Tokens()))
    with torch.inference_mode():  # where torch has another kernel
        expected = torch.stack([hne.leaf(index).eval()(X) for index in range(2)], 1)
        torch.testing.assert_close(hne.eval()(X), expected, rtol=1e-4, atol=1e-5)


def test_instance_norm_with_running_statistics() -> None:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    hne = assert_leaves(chain(norm))
    hne.train()(X)
    leaf = hne.leaf(1).eval()
    torch.testing.assert_close(hne.eval()(X)[:, 1], leaf(X), rtol=1e-4, atol=1e-5)


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


def test_squeeze_meets_a_batch_of_one() -> None:
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Squeezed(), nn.Linear(8, 5))
    hne = assert_leaves(model)
    expected = torch.stack([hne.leaf(index).eval()(X[:1]).view(1, 5) for index in range(2)], 1)
    torch.testing.assert_close(hne.eval()(X[:1]).view(1, 2, 5), expected, rtol=1e-4, atol=1e-5)


class Binarised(nn.Module):
    """Signs of a flat parameter, times the mean of its sizes over all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(8 * 8 * 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weights.view(8, 8, 3, 3)
        scale = weight.abs().mean().detach()
        return F.conv2d(x, scale * weight.sign() + weight - weight.detach())


def test_a_weight_computed_from_a_flat_parameter() -> None:
    assert_leaves(chain(Binarised()))


class PerImageKernels(nn.Module):
    """Every image is convolved with a kernel of its own: as many groups as images."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Linear(8, 8 * 8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = self.kernels(x.mean((2, 3))).view(n * c, c, 1, 1)
        return F.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n).view(n, c, h, w)


@pytest.mark.parametrize("batch", [1, 5])
def test_as_many_groups_as_images(batch: int) -> None:
    assert_leaves(chain(PerImageKernels()), x=torch.randn(batch, 3, 16, 16))


class Codebook(nn.Module):
    """Moves its buffer towards what it sees, in place and while training only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.centre[:, None, None]


def test_a_buffer_that_forward_updates() -> None:
    hne = treeify.hierarchicalize(
        chain(Codebook()), ["1"], init="perturb", seed=3, example_input=X
    ).train()
    leaves = [hne.leaf(index).train() for index in range(2)]
    hne(X)
    for index, leaf in enumerate(leaves):
        leaf(X)
        torch.testing.assert_close(hne.get_buffer("2.centre").chunk(2)[index], leaf[2].centre)
    expected = torch.stack([leaf.eval()(X) for leaf in leaves], 1)
    torch.testing.assert_close(hne.eval()(X), expected, rtol=1e-4, atol=1e-5)
