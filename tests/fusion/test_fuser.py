"""What may be fused, and what must stay as it is since another value needs it."""

from collections.abc import Callable

import pytest
import small
import torch
import torch.nn.functional as F
from fusing import Ensemble, assert_fused_equals, fused_modules, run
from fusing_nets import Net, Residual, convert, ensemble
from torch import Tensor
from torch.testing import assert_close

import treeify
from treeify.engine.plan import Plan
from treeify.fusion import AddInto, FusedConv, Overwrite


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _twice(net: Residual, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return y + y


def _in_place_on_both(net: Residual, x: Tensor) -> Tensor:
    y = net.conv1(x)
    y += x
    z = net.conv2(y)
    z.add_(y)
    return F.relu(z, inplace=True)


def _read_twice(net: Residual, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return F.relu(y) + net.norm(y)


def _view_read(net: Residual, x: Tensor) -> Tensor:
    y = net.norm(net.conv1(x))
    left, right = y.chunk(2, 1)
    return torch.cat((F.relu(left) + right, right), 1)


def _attention(net: Residual, x: Tensor) -> Tensor:
    y = net.norm(net.conv1(x))
    gate = net.conv2(y.mean((2, 3), keepdim=True))
    return F.relu(y * gate.sigmoid() + x)


JOINS: dict[str, Callable[[Residual, Tensor], Tensor]] = {
    "conv + x": lambda net, x: net.norm(net.conv1(x)) + x,
    "x + conv": lambda net, x: x + net.norm(net.conv1(x)),
    "relu(conv + x)": lambda net, x: F.relu(net.norm(net.conv1(x)) + x),
    "conv + conv": lambda net, x: F.relu(net.norm(net.conv1(x)) + net.conv2(x)),
    "relu(conv) + conv": lambda net, x: F.relu(net.conv1(x)) + net.conv2(x),
    "relu(conv) + relu(conv)": lambda net, x: F.relu(net.conv1(x)) + F.relu(net.conv2(x)),
    "conv + conv + x": lambda net, x: (net.conv1(x) + net.norm(net.conv2(x)) + x).relu(),
    "chain": lambda net, x: net.conv2(net.conv1(x) + x) + net.conv1(x),
    "torch.add": lambda net, x: torch.add(net.conv1(x), x),
    "torch.add alpha": lambda net, x: torch.add(net.conv1(x), x, alpha=2),
    "method add": lambda net, x: net.conv1(x).add(x).relu(),
    "method add alpha": lambda net, x: net.conv1(x).add(x, alpha=0.5).relu(),
    "subtraction": lambda net, x: F.relu(net.conv1(x) - x),
    "product": lambda net, x: F.silu(net.conv1(x) * x),
    "y + y": _twice,
    "in place": _in_place_on_both,
    "read twice": _read_twice,
    "views": _view_read,
    "attention": _attention,
    "number": lambda net, x: net.conv1(x) + 2,
    "number from the right": lambda net, x: 2 + net.conv1(x),
    "size": lambda net, x: net.conv1(x) + x.shape[1],
    "size from the right": lambda net, x: x.size(2) + net.conv1(x),
    "scalar parameter": lambda net, x: net.conv1(x) + net.scale,
    "scaled": lambda net, x: net.conv1(x) * net.scale + x,
    "broadcast": lambda net, x: net.conv1(x) + x.mean((2, 3), keepdim=True),
    "broadcast onto conv": lambda net, x: net.conv1(x.mean((2, 3), keepdim=True)) + x,
    "one norm, two convolutions": lambda net, x: net.norm(net.conv2(net.norm(net.conv1(x)))),
    "one convolution, two norms": lambda net, x: net.other_norm(net.conv1(net.norm(net.conv1(x)))),
    "norms of one output": lambda net, x: _norms(net, net.conv1(x)),
    "double": lambda net, x: (net.conv1(x).double() + x.double()).float(),
    "never read": lambda net, x: _dropped(net, net.conv1(x)),
    "activation twice": lambda net, x: F.gelu(F.hardswish(F.relu6(net.conv1(x)))),
}


def _norms(net: Residual, y: Tensor) -> Tensor:
    return net.norm(y) + net.other_norm(y)


def _dropped(net: Residual, y: Tensor) -> Tensor:
    gate = y.sigmoid()
    net.dropout(gate * gate.tanh() + gate)
    return y


@pytest.mark.parametrize("join", JOINS)
def test_sums_and_values_read_twice(join: str) -> None:
    assert_fused_equals(convert(Net(Residual(JOINS[join]), Residual(JOINS[join])), ["stage2:3"]))


def test_sums_and_activations_are_fused() -> None:
    join = JOINS["relu(conv + x)"]
    hne = convert(Net(Residual(join), Residual(join)))
    assert len(fused_modules(hne, FusedConv)) == 3
    assert not fused_modules(hne, AddInto)
    assert not fused_modules(hne, Overwrite)
    targets = [node.target for s in hne._fused.program.segments for node in s.module.graph.nodes]
    assert F.relu not in targets


def test_values_that_cross_levels_stay_as_they_were() -> None:
    class Skips(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem[0](x)  # unnormed: read by all levels
            first = self.stage1[0](self.stem[1](stem).relu())
            second = self.stage2[0](first.relu()) + first
            return self.head((second.relu() + first + stem).mean((2, 3)))

    hne = convert(Skips(), ["stage1", "stage2:3"])
    assert_fused_equals(hne)
    x = small.images()
    hne.tunings.update(_fused_tuning(hne, x))
    expected = run(hne, x, fuse=False)
    session = hne.session(x)
    for size in range(1, hne.leaves + 1):
        activations = {
            (level, name): (value.value, value.value.clone())
            for level, values in session._kept.items()
            for name, value in values.items()
        }
        session.advance(to=size)
        assert all(torch.equal(now, before) for now, before in activations.values())
        assert_close(session.leaf_logits, expected[:, :size], rtol=1e-4, atol=1e-5)
    assert hne._program(hne.plan(x)) is hne._programs[False]  # with gradients
    with torch.no_grad():
        assert hne._program(hne.plan(x)) is hne._fused.program


def _fused_tuning(hne: Ensemble, x: Tensor) -> dict:
    situation = treeify.engine.plan.Situation.of(x, training=False)
    plan = Plan(("packed",) * hne.tree.levels, None, fuse=True)
    return {situation: treeify.engine.plan.Tuning(situation, plan)}


def test_with_gradients_nothing_is_fused() -> None:
    hne, x = ensemble(), small.images()
    run(hne, x, fuse=True)
    gradients = []
    for fuse in (True, False):
        hne.zero_grad()
        logits = hne.run(x, hne.leaves, Plan(("packed",) * 3, None, fuse))
        assert logits.requires_grad
        logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in hne.parameters()])
    assert_close(gradients[0], gradients[1])


def test_in_training_mode_nothing_is_fused() -> None:
    hne, x = ensemble(), small.images()
    hne.train()
    means = hne.get_submodule("stem.1").running_mean.clone()
    run(hne, x, fuse=True)
    assert not torch.equal(hne.get_submodule("stem.1").running_mean, means)


def test_functional_calls_use_the_given_weights() -> None:
    hne, x = ensemble(), small.images()
    hne.tunings.update(_fused_tuning(hne, x))
    other = {name: 1.5 * tensor.detach() for name, tensor in hne.named_parameters()}
    with torch.no_grad():
        before = hne(x)
        logits = torch.func.functional_call(hne, other, (x,))
        assert torch.equal(hne(x), before)
        hne.load_state_dict(other, strict=False)
        assert_close(logits, run(hne, x, fuse=False), rtol=1e-4, atol=1e-5)


def test_fusing_leaves_the_other_programs_alone() -> None:
    hne, x = ensemble(), small.images()
    graphs = [str(segment.module.graph) for segment in hne._programs[False].segments]
    before = hne(x)
    run(hne, x, fuse=True)
    assert graphs == [str(segment.module.graph) for segment in hne._programs[False].segments]
    assert torch.equal(hne(x), before)
    assert "FusedConv" not in {type(module).__name__ for module in hne.modules()}
