"""Fused convolutions compute what unfused ones do."""

import copy
from collections.abc import Callable

import pytest
import small
import torch
import torch.nn.functional as F
from fusing import EXECUTIONS, assert_fused_equals, fused_modules, run
from fusing_nets import WIDTH, Net, Residual, conv, convert, ensemble
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.testing import assert_close

from treeify.fusion import FusedConv


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU, nn.Identity),
    nn.Sigmoid,  # cannot overwrite its input
)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_norms_and_activations_are_part_of_the_convolution(
    activation: Callable[[], nn.Module] | None,
) -> None:
    after = [activation()] if activation else []
    stages = [nn.Sequential(conv(bias=bias), nn.BatchNorm2d(WIDTH), *after) for bias in (0, 1)]
    hne = convert(Net(*stages))
    assert len(fused_modules(hne, FusedConv)) == 3
    assert all(module.operations[1] is not None for module in fused_modules(hne, FusedConv))
    assert_fused_equals(hne)


def test_approximate_gelu_and_sloped_activations_keep_their_options() -> None:
    stages = [
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), activation)
        for activation in (nn.GELU("tanh"), nn.LeakyReLU(0.7))
    ]
    assert_fused_equals(convert(Net(*stages)))


@pytest.mark.parametrize(
    "stage",
    [
        conv(groups=4),
        conv(groups=WIDTH),
        nn.Sequential(conv(groups=2), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        nn.Sequential(conv(groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.SiLU()),
        conv(stride=2),
        conv(dilation=2, padding=(1, 2)),
        conv(padding="same"),
        conv(padding="same", dilation=2),
        conv(padding="valid"),
        conv(padding_mode="reflect"),
        nn.Sequential(conv(padding_mode="circular"), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        nn.Sequential(Conv2dSame(WIDTH, WIDTH, 3, stride=2), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        nn.Sequential(Conv2dSame(WIDTH, WIDTH, 3, stride=2, groups=4), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, act_layer=nn.SiLU)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, act_layer=nn.PReLU)),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, apply_act=False), nn.ReLU()),
        nn.Sequential(conv(), BatchNormAct2d(WIDTH, drop_layer=nn.Dropout), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH, affine=False), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH, track_running_stats=False), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(WIDTH, eps=0.5), nn.ReLU(), nn.Hardswish()),
        nn.Sequential(nn.ReLU(), conv(), nn.ReLU(inplace=True), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(WIDTH, WIDTH, 3), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        nn.Sequential(
            nn.Unflatten(1, (WIDTH, 1)),
            nn.Conv3d(WIDTH, WIDTH, 3, padding=1),
            nn.BatchNorm3d(WIDTH),
            nn.Flatten(1, 2),
        ),
    ],
    ids=repr,
)
def test_layers_right_after_a_split(stage: nn.Module) -> None:
    if isinstance(stage, nn.Sequential) and isinstance(stage[0], nn.Flatten):
        assert_fused_equals(convert(Net(stage, nn.Conv1d(WIDTH, WIDTH, 1))))
    else:
        assert_fused_equals(convert(Net(stage, copy.deepcopy(stage))))


def test_a_copied_gelu_still_runs() -> None:
    hne = convert(Net(nn.Sequential(conv(), nn.GELU("tanh")), nn.Sequential(conv(), nn.ReLU6())))
    assert_fused_equals(copy.deepcopy(hne))


def test_a_norm_in_training_mode_uses_the_batch() -> None:
    hne = convert(Net(Residual(lambda net, x: F.relu(net.norm(net.conv1(x)) + x))))
    twins = [hne, copy.deepcopy(hne)]
    x = small.images(4)
    logits = []
    for twin, fuse in zip(twins, (True, False), strict=True):
        run(twin, x, fuse=fuse)
        twin.get_submodule("stage1.norm").train()
        logits.append(run(twin, x, fuse=fuse, execution="looped"))
        logits.append(run(twin, x, fuse=fuse))
    assert_close(logits[:2], logits[2:], rtol=1e-4, atol=1e-5)
    buffers = zip(twins[0].buffers(), twins[1].buffers(), strict=True)
    assert all(torch.allclose(one, other) for one, other in buffers)


def test_a_norm_with_its_activation_in_training_mode_uses_the_batch() -> None:
    hne = convert(Net(nn.Sequential(conv(), BatchNormAct2d(WIDTH)), conv()))
    hne.get_submodule("stage1.1").train()
    x = small.images(4)
    assert_close(run(hne, x, fuse=True), run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # a flag that is set along with the other
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_dtypes_and_memory_formats(count: int, dtype: torch.dtype, onednn: bool) -> None:
    stages = [nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.ReLU()), nn.Conv2d(WIDTH, WIDTH, 1)]
    hne, x = convert(Net(*stages)).to(dtype), small.images(count).to(dtype)
    for execution in EXECUTIONS:
        expected = torch.cat([hne.leaf(n)(x)[:, None].detach() for n in range(4)], dim=1)
        for channels_last in (None, True, False):
            with torch.backends.mkldnn.flags(enabled=onednn):
                logits = run(hne, x, fuse=True, execution=execution, channels_last=channels_last)
            assert logits.dtype == dtype
            assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_images_of_any_layout_and_size() -> None:
    hne, x = ensemble(), small.images(4)
    wide = torch.cat((x, x), dim=1)
    inputs = [
        x.to(memory_format=torch.channels_last),
        x[:1].expand(4, -1, -1, -1),
        wide[:, ::2],
        wide[:, 2:5],
        x.transpose(2, 3),
        x[::2],
        torch.randn(2, 3, 5, 7),
        torch.randn(3, 3, 16, 16),
    ]
    for image in inputs:
        assert_fused_equals(hne, image)


def test_mixed_precision() -> None:
    hne, x = ensemble(), small.images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run(hne, x, fuse=True)
    assert_close(logits.float(), run(hne, x, fuse=False), rtol=0.05, atol=0.05)


def test_hooks_on_modules_are_called() -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    calls: list[str] = []
    handle = hne.get_submodule("stage1.1").register_forward_hook(lambda *_: calls.append("norm"))
    twin = copy.deepcopy(hne)
    run(hne, x, fuse=True)
    run(twin, x, fuse=True)
    assert calls == ["norm"] * 2
    handle.remove()
    run(hne, x, fuse=True)
    assert calls == ["norm"] * 2
