"""Fused layers compute with the weights as they are now, however those have changed."""

import copy
from collections.abc import Callable

import pytest
import small
import torch
from fusing import EXECUTIONS, Ensemble, assert_fused_equals, assign_data, fused_modules, run, step
from fusing_nets import ensemble
from torch import nn
from torch.testing import assert_close

from treeify.engine.plan import Plan
from treeify.fusion import FusedConv, packed_module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _adam_step(hne: Ensemble) -> None:
    optimizer = torch.optim.AdamW(hne.parameters(), lr=0.1, foreach=True)
    hne(small.images()).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def _copy(hne: Ensemble) -> None:
    for tensor in (*hne.parameters(), *hne.buffers()):
        tensor.copy_(tensor * 1.5)


@torch.inference_mode()
def _copy_in_inference_mode(hne: Ensemble) -> None:
    hne.load_state_dict(small.ensemble(seed=5).state_dict())


def _replace(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach() * 2)


def _train(hne: Ensemble) -> None:
    hne.train()
    with torch.no_grad():
        hne(3 * small.images(4, seed=8) + 1)
    hne.eval()


def _train_looped(hne: Ensemble) -> None:
    hne.execution = "looped"
    _train(hne)


def _train_without_counters(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    _train(hne)


def _train_one_norm(hne: Ensemble) -> None:
    """A batch norm that learns statistics inside an ensemble that stays in evaluation mode."""
    norm = hne.get_submodule("stage1.1").train()
    run(hne, 2 * small.images(4, seed=8), fuse=True)
    norm.eval()


def _train_one_norm_without_a_counter(hne: Ensemble) -> None:
    hne.get_submodule("stage1.1").num_batches_tracked = None
    _train_one_norm(hne)


def _reset(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def _other_eps(hne: Ensemble) -> None:
    for module in hne.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


def _tune_training(hne: Ensemble) -> None:
    _train(hne)
    hne.tune(small.images(), training=True, repeats=1)


CHANGES = [
    *(step, _adam_step, _copy, _copy_in_inference_mode, _replace, assign_data, _train),
    *(
        _train_looped,
        _train_without_counters,
        _train_one_norm,
        _reset,
        _train_one_norm_without_a_counter,
        _other_eps,
    ),
    _tune_training,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_folded_weights_follow_the_weights(change: Callable[[Ensemble], None]) -> None:
    hne, x = ensemble(), small.images()
    before = {
        execution: [run(hne, x, fuse=True, execution=execution, leaves=leaves) for leaves in (6, 4)]
        for execution in EXECUTIONS
    }
    change(hne)
    assert not hne.training
    for execution in EXECUTIONS:
        for old in before[execution]:
            leaves = old.shape[1]
            logits = run(hne, x, fuse=True, execution=execution, leaves=leaves)
            expected = run(hne, x, fuse=False, leaves=leaves)
            assert not torch.allclose(logits, old, rtol=1e-3)
            assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_folded_weights_follow_dtype_and_memory_format() -> None:
    hne, x = ensemble(), small.images()
    assert_fused_equals(hne, x)
    hne.to(memory_format=torch.channels_last)
    assert_fused_equals(hne, x)
    hne.to(torch.float64)
    assert_close(run(hne, x.double(), fuse=True), run(hne, x.double(), fuse=False))
    hne.to(torch.bfloat16)
    halves = [run(hne, x.bfloat16(), fuse=fuse) for fuse in (True, False)]
    assert_close(*halves, rtol=0.05, atol=0.05)
    hne.float()
    assert_fused_equals(hne, x)


def test_copies_fold_their_own_weights() -> None:
    hne, x = ensemble(), small.images()
    before = run(hne, x, fuse=True)
    twin = copy.deepcopy(hne)
    assert_close(run(twin, x, fuse=True), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert run(twin, x, fuse=True).abs().max() == 0
    assert_close(run(hne, x, fuse=True), before, rtol=0, atol=0)
    convolutions = {
        id(packed_module(module.operations[0])) for module in fused_modules(twin, FusedConv)
    }
    assert convolutions <= {id(module) for module in twin.modules()}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_inference_mode(execution: str) -> None:
    hne, x = ensemble(), small.images()
    expected = run(hne, x, fuse=False)
    with torch.inference_mode():
        inside = hne.run(x, 6, Plan((execution,) * 3, None, fuse=True))
    assert_close(inside, expected, rtol=1e-4, atol=1e-5)
    # What inference mode folded serves calls outside of it, and follows the weights.
    assert_close(run(hne, x, fuse=True, execution=execution), expected, rtol=1e-4, atol=1e-5)
    _copy(hne)
    assert_close(
        run(hne, x, fuse=True, execution=execution), run(hne, x, fuse=False), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("changed", ["all", "norm", "conv"])
def test_tensors_made_in_inference_mode(changed: str) -> None:
    hne, x = ensemble(), small.images()
    with torch.inference_mode():
        for module in hne.modules():
            kinds = {"all": nn.Module, "norm": nn.BatchNorm2d, "conv": nn.Conv2d}
            if isinstance(module, kinds[changed]):
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            is_parameter = isinstance(tensor, nn.Parameter)
                            new = tensor.clone()
                            table[name] = (
                                nn.Parameter(new, requires_grad=False) if is_parameter else new
                            )
    assert_fused_equals(hne, x)
    with torch.inference_mode():
        for tensor in (*hne.parameters(), *hne.buffers()):
            tensor.mul_(2)
    assert_fused_equals(hne, x)


def test_prepared_weights_do_not_pile_up() -> None:
    hne = ensemble()
    for count in range(1, 12):
        for leaves in range(1, 7):
            run(hne, small.images(count), fuse=True, leaves=leaves)
    for module in fused_modules(hne, FusedConv):
        cached = sum(weight.numel() for weight, _ in module._cache.values())
        assert cached <= 4 * packed_module(module.operations[0]).weight.numel()


def test_parametrized_weights_are_followed() -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    torch.nn.utils.parametrizations.weight_norm(hne.get_submodule("stem.0"))
    with torch.no_grad():
        hne.get_submodule("stem.0").parametrizations.weight.original0.mul_(2)
    assert_fused_equals(hne, x)
