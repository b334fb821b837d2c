"""Lines that people write in their own models: converted, they mean what they mean there."""

import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropBlock2d
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import treeify
from treeify.errors import TraceError
from treeify.fusion import FusedConv

EXAMPLE = torch.zeros(1, 3, 16, 16)
SPLITS = (["stem"], ["body"], ["stem", "body"], ["head"])


class Net(nn.Module):
    """What all of them are made of."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("number", torch.tensor(2.0, dtype=torch.float64))
        self.head = nn.Linear(8, 5)


class Alias(Net):
    """Another name of a value that is changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip = x
        x += self.bias
        skip -= 1
        return self.head((self.body(x) + skip).mean((2, 3)))


class Parts(Net):
    """Parts set, and changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x[:, 0] += 1
        x[:, 1:3] *= self.scale
        x[:, 4] = x[:, 5]
        return self.head(self.body(x).mean((2, 3)))


class Picked(Net):
    """A copy that indices give, changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x[:, [1, 0, 3, 2, 5, 4, 7, 6]]
        y += self.bias
        return self.head((self.body(y) + x).mean((2, 3)))


class Inner(nn.Module):
    """Sets a part of a view."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        flat = x.flatten(2)
        flat[:, :, 0] = 0
        return x


class Viewing(Net):
    """The same in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inner(self.stem(x))).mean((2, 3)))


class Keeping(Net):
    """Keeps what it computed, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Seeing()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inner(self.inner(self.stem(x)))).mean((2, 3)))


class Seeing(nn.Module):
    """Leaves a value in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x * 2
        return x + 1


class Strides(Net):
    """Strides that the tensor has."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        n, c, h, w = x.shape
        own = x.stride()
        by = (own[0], own[1], own[2], own[3], own[2], own[3])
        patches = x.as_strided((n, c, h - 2, w - 2, 3, 3), by)
        return self.head(patches.mean((2, 3, 4, 5)))


class Ordered(Net):
    """Gives an ordered dictionary."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(out=self.head(self.body(self.stem(x)).mean((2, 3))))


class Sizes(Net):
    """Numbers, which stay what they are under their other names."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        side = x.shape[2]
        was = side
        side += 2
        side //= 2
        x = F.interpolate(x, (side, was))
        return self.head(self.body(x).mean((2, 3)))


class NoAffine(Net):
    """Norms without parameters, of channels and of groups of them."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.GroupNorm(2, 8, affine=False)
        self.images = nn.InstanceNorm2d(8)
        self.batch = nn.BatchNorm2d(8, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.stem(x))
        x = self.groups(self.batch(self.images(self.body(x)) + x))
        return self.head(x.square().mean((2, 3)))


class Numbers(Net):
    """Tensors without dims, which leave dtypes alone and fill masks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x) * torch.tensor(0.5, dtype=torch.float64)) * self.number
        x = torch.where(x > 0, x, torch.tensor(0.0)) * self.scale
        x = x.masked_fill(x > 1, torch.tensor(0.1)).masked_fill(x < -1, self.scale)
        return self.head(x.mean((2, 3)))


class Patches(Net):
    """Strides by hand."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        n, c, h, w = x.shape
        patches = x.as_strided((n, c, h - 2, w - 2, 3, 3), (c * h * w, h * w, w, 1, w, 1))
        return self.head(patches.mean((2, 3, 4, 5)))


class Asking(Net):
    """Asks whether its backbone gives a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.stem(x))
        if not isinstance(features, Tensor):
            features = features[0]
        if not torch.is_tensor(features):
            features = features[0]
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize("splits", SPLITS, ids=",".join)
@pytest.mark.parametrize(
    "model",
    [
        *(Alias, Parts, Picked, Viewing, Keeping, Sizes, NoAffine, Numbers, Patches, Strides),
        *(Asking, Ordered),
    ],
)
def test_a_line_means_what_it_means_in_the_model(model: type[Net], splits: list[str]) -> None:
    torch.manual_seed(0)
    base, x = model(), torch.rand(2, 3, 16, 16)
    hne = treeify.hierarchicalize(base, splits, init="perturb", example_input=EXAMPLE)
    assert treeify.verify(hne, x).worst <= 1
    with torch.no_grad():
        # `verify` compares with leaves, whose code is the model's own only if it was not changed.
        for own, wanted in zip(
            tree_leaves(hne.eval()(x)), tree_leaves(base.eval()(x)), strict=True
        ):
            assert_close(own[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_a_number_keeps_a_model_in_half_precision() -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.stem(x) * torch.tensor(0.5))
            return self.head((x * self.number).mean((2, 3)))

    hne = treeify.hierarchicalize(
        Half().bfloat16(), ["stem"], init="fresh", example_input=EXAMPLE.bfloat16()
    ).eval()
    assert hne(torch.rand(2, 3, 16, 16).bfloat16()).dtype is torch.bfloat16


def test_a_part_that_is_changed_where_the_whole_is_read_afterwards_is_refused() -> None:
    class View(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            first = x[:, 0]
            first += 1
            return self.head(self.body(x).mean((2, 3)))

    with pytest.raises(TraceError, match="changes getitem in place, a view of stem"):
        treeify.hierarchicalize(View(), ["body"], init="fresh", example_input=EXAMPLE)


def test_a_single_image_keeps_its_batch() -> None:
    class Squeezing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.adaptive_avg_pool2d(self.body(self.stem(x)), 1).squeeze())

    hne = treeify.hierarchicalize(
        Squeezing(), ["stem", "body"], init="fresh", example_input=EXAMPLE
    ).eval()
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert_close(hne(x[:1]), hne(x)[:1])
        assert hne(x[:1], leaves=1).shape == (1, 1, 5)


def test_classes_beside_logits_are_those_of_most_leaves() -> None:
    class Deciding(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.body(self.stem(x)).mean((2, 3)))
            return {"logits": logits, "class": logits.argmax(1), "sure": logits.amax(1) > 0.2}

    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Deciding(), ["stem", "body"], init="fresh", example_input=EXAMPLE
    ).eval()
    x = torch.rand(9, 3, 16, 16)
    leaves, answer = hne(x), hne.predict(x)
    for image in range(9):
        votes = torch.bincount(leaves["class"][image], minlength=5)
        assert votes[answer["class"][image]] == votes.max()
        most = leaves["sure"][image].sum() > 2
        assert answer["sure"][image] == most
    assert answer["sure"].dtype is torch.bool
    assert hne.train().tune(x, repeats=1, budget=0.1).seconds


def test_every_branch_drops_blocks_of_its_own() -> None:
    drop = partial(DropBlock2d, drop_prob=0.5, block_size=3)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), BatchNormAct2d(8, drop_layer=drop)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    hne = treeify.hierarchicalize(model, ["0"], init="copy", example_input=EXAMPLE).train()
    out = hne(torch.rand(4, 3, 16, 16))
    assert not torch.equal(out[:, 0], out[:, 1])


class Slow(nn.Module):
    """Stays closed, and lets other threads run between two uses of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.sum() > 1e9:
            x = -x
        time.sleep(0.02)
        return self.inner(x)


def test_threads_can_share_an_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), Slow(), *head)
    x = torch.rand(2, 3, 16, 16)
    hne = treeify.hierarchicalize(model, ["1"], init="perturb", example_input=EXAMPLE).eval()
    hne.tune(x, repeats=1, budget=0.1)

    def call(size: int) -> Tensor:
        with torch.no_grad():
            return hne(x, leaves=size)

    want = call(2)
    fold = FusedConv.fold

    def slowly(self: FusedConv) -> object:
        time.sleep(0.01)
        return fold(self)

    monkeypatch.setattr(FusedConv, "fold", slowly)
    for _ in range(3):
        with torch.no_grad():
            hne.get_submodule("1").bias.add_(0)  # its weights are prepared again
        with ThreadPoolExecutor(4) as pool:
            sizes = [1, 2, 2, 1, 2, 1]
            for size, found in zip(sizes, pool.map(call, sizes), strict=True):
                assert_close(found, want[:, :size])
