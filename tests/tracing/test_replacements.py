"""Replacements of functions of libraries compute the same."""

import pytest
import torch
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import SwinTransformer, swin_transformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import treeify
from treeify.parity.fresh_weights import settle
from treeify.tracing.replacements import OF_EACH_IMAGE, REPLACEMENTS

HEADS, CHANNELS = 2, 8


def _inputs(sides: tuple[int, int], window: list[int], cosine: bool) -> dict[str, Tensor]:
    tokens = window[0] * window[1]
    shapes = {
        "input": (3, *sides, CHANNELS),
        "qkv_weight": (3 * CHANNELS, CHANNELS),
        "proj_weight": (CHANNELS, CHANNELS),
        "relative_position_bias": (1, HEADS, tokens, tokens),
        "qkv_bias": (3 * CHANNELS,),
        "proj_bias": (CHANNELS,),
    }
    if cosine:
        shapes["logit_scale"] = (HEADS, 1, 1)
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shift", [[0, 0], [1, 2], [0, 1]])
@pytest.mark.parametrize(
    ("sides", "window"), [((6, 9), [3, 3]), ((5, 7), [2, 3]), ((3, 8), [3, 4]), ((2, 2), [4, 3])]
)
def test_window_attention_is_torchvisions(
    sides: tuple[int, int], window: list[int], shift: list[int], cosine: bool, biased: bool
) -> None:
    """Shifted or not, padded or not, with windows larger than the image; gradients too."""
    torch.manual_seed(0)
    original = swin_transformer.shifted_window_attention
    inputs = _inputs(sides, window, cosine)
    if not biased:
        del inputs["qkv_bias"], inputs["proj_bias"]
    options = {"window_size": window, "shift_size": shift, "num_heads": HEADS}
    expected = original(**inputs, **options)
    found = REPLACEMENTS[original](**inputs, **options)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad(out, list(inputs.values()), direction) for out in (found, expected)
    ]
    assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_its_dropouts_are_torchvisions() -> None:
    original = swin_transformer.shifted_window_attention
    inputs = _inputs((6, 6), [3, 3], cosine=False)
    options = {"window_size": [3, 3], "shift_size": [1, 1], "num_heads": HEADS}
    plain = REPLACEMENTS[original](**inputs, **options, attention_dropout=0.5, dropout=0.5)
    kept = REPLACEMENTS[original](
        **inputs, **options, attention_dropout=0.5, dropout=0.5, training=False
    )
    assert_close(kept, original(**inputs, **options))
    assert (plain == 0).double().mean() == pytest.approx(0.5, abs=0.15)
    for rate in ("attention_dropout", "dropout"):
        dropped = REPLACEMENTS[original](**inputs, **options, **{rate: 0.5})
        assert not torch.allclose(dropped, kept)


@pytest.mark.parametrize("second", [False, True])
def test_windows_run_packed_and_images_of_any_size_are_taken(second: bool) -> None:
    versions = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    torch.manual_seed(0)
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[3, 3],
        num_classes=5,
        **(versions if second else {}),
    )
    settle(model)
    hne = treeify.hierarchicalize(
        model, ["features.1.0:3"], init="perturb", example_input=torch.zeros(1, 3, 32, 32)
    )
    # The second version's network for position biases is as large as the rest of so small a model.
    assert hne.conversion.packed_fraction > (0.85 if second else 0.99)
    looped = {reason.partition(":")[0] for reason in hne.conversion.fallbacks}
    assert not looped & {own.__name__ for own in (*REPLACEMENTS, *OF_EACH_IMAGE)}
    for sides in ((32, 32), (44, 28)):
        assert treeify.verify(hne, torch.rand(2, 3, *sides)).worst <= 1


def test_linear_attention_is_timms() -> None:
    """Gradients too, and under autocast, where it takes full precision."""
    torch.manual_seed(0)
    module = LiteMLA(16, 16, scales=(3, 5)).eval()
    x = torch.randn(2, 16, 5, 7, requires_grad=True)
    replacement = REPLACEMENTS[LiteMLA.forward]
    for kwargs in ({"enabled": False}, {"dtype": torch.bfloat16}):
        with torch.autocast("cpu", **kwargs):
            found, expected = replacement(module, x), module(x)
        assert found.dtype == expected.dtype
        assert_close(found, expected)
        direction = torch.randn_like(expected)
        inputs = [x, *module.parameters()]
        gradients = [torch.autograd.grad(out, inputs, direction) for out in (found, expected)]
        assert_close(*gradients)


class Attending(nn.Module):
    """`[N, 3, 8, 8] -> [N, 16]`."""

    def __init__(self, kind: type[LiteMLA]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.attention = kind(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.stem(x)).mean((2, 3))


class Doubled(LiteMLA):
    """What it computes is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super()._attn(x, x, x)


@pytest.mark.parametrize("kind", [LiteMLA, Doubled])
def test_linear_attention_runs_packed(kind: type[LiteMLA]) -> None:
    torch.manual_seed(0)
    model = Attending(kind)
    settle(model)
    hne = treeify.hierarchicalize(
        model, ["stem:3"], init="perturb", example_input=torch.zeros(1, 3, 8, 8)
    )
    assert hne.conversion.packed_fraction == 1
    assert treeify.verify(hne, torch.rand(2, 3, 9, 6)).worst <= 1
