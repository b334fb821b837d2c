"""What the tracer records: tensors that `forward` makes, loops, names, modules marked as leaves."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.conversion.assemble import trace_model
from treeify.engine.preserve import preserve_buffers
from treeify.errors import TraceError
from treeify.tracing.trace import trace


class Gated(small.SmallNet):
    """Adds up in place what its gates say, starting from a tensor it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterList(nn.Parameter(torch.randn(())) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for gate in self.gates:
            total += torch.sigmoid(gate)
        return super().forward(x * total)


class Penalised(small.SmallNet):
    """Adds up in place a penalty of its activations."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        penalty = torch.tensor(0.0)
        for stage in (self.stem, self.stage1, self.stage2):
            x = stage(x)
            penalty += x.abs().mean()
        return {"logits": self.head(x.mean((2, 3))), "penalty": penalty}


class Rotating(small.SmallNet):
    """Sets the elements of a tensor it makes, and reads it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        rotation = torch.zeros(2, 2)
        rotation[0, 0] = self.angle.cos()
        rotation[0, 1] = -self.angle.sin()
        rotation[1, 0] = self.angle.sin()
        rotation[1, 1] = self.angle.cos()
        for _ in range(2):
            x = (x.unflatten(1, (4, 2)).movedim(2, -1) @ rotation).movedim(-1, 2).flatten(1, 2)
        return self.head(self.stage2(x).mean((2, 3)))


def outputs(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("splits", [["input"], ["stage1"], ["stem", "stage2"]], ids=str)
@pytest.mark.parametrize("model", [Gated, Penalised, Rotating])
def test_a_tensor_made_in_forward_is_made_anew_in_every_pass(
    model: type[nn.Module], splits: list[str]
) -> None:
    torch.manual_seed(0)
    base = model()
    x = small.images(2)
    hne = treeify.hierarchicalize(base, splits, init="perturb", example_input=small.EXAMPLE)
    assert treeify.verify(hne, x).worst <= 1
    hne.train()
    with preserve_buffers(hne):
        for _ in range(2):  # a graph that outlived its pass would be gone through again
            torch.stack([own.sum() for own in outputs(hne(x))]).sum().backward()
    hne.eval(), base.eval()
    with torch.no_grad():
        for _ in range(2):
            for found, expected in zip(outputs(hne(x)), outputs(base(x)), strict=True):
                assert_close(found.select(min(1, found.ndim - 1), 0), expected)


class Late(nn.Module):
    """Changes a tensor that it made after having used it; `[N, C, H, W] -> [N, C, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.ones(8, 1, 1)
        x = self.conv(x + steps)
        steps[:4] = 0.5
        return x + steps


class FromList(nn.Module):
    """Takes its parameters from a list of them; `[N, C, H, W] -> [N, C, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterList(nn.Parameter(torch.randn(())) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.softmax(torch.stack(list(self.gates.parameters())), 0)
        return x * one + x.relu() * two


LEAF_MODULES: dict[type[nn.Module], str] = {
    Late: "it changes a tensor that it has used before",
    FromList: "it takes parameters from a list",
}


@pytest.mark.parametrize("kind", LEAF_MODULES)
def test_what_no_graph_shows_of_made_tensors_makes_a_leaf_module(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = small.SmallNet()
    model.stage2 = nn.Sequential(kind(), nn.ReLU())
    hne = treeify.hierarchicalize(model, ["stage1"], init="perturb", example_input=small.EXAMPLE)
    assert list(hne.traced.leaf_modules) == ["stage2.0"]
    assert hne.traced.leaf_modules["stage2.0"].startswith(LEAF_MODULES[kind])
    assert treeify.verify(hne, small.images(2)).worst <= 1


def test_a_value_that_a_cache_keeps_from_another_pass_is_named() -> None:
    kept: dict[int, Tensor] = {}

    class Root(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            if 8 not in kept:
                kept[8] = self.head.weight.mean(0)
            return super().forward(x * kept[8][:3, None, None])

    with pytest.raises(TraceError, match="it reads a value of another pass, as a cache keeps them"):
        treeify.hierarchicalize(Root(), ["stage1"], init="fresh", example_input=small.EXAMPLE)


class Chunked(small.SmallNet):
    """Loops over parts of its activations; `[N, 3, 8, 8] -> [N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        x = torch.cat([conv(part) for conv, part in zip(self.convs, x.chunk(2, 1), strict=True)], 1)
        x = torch.cat([part.relu() for part in torch.split(x, [3, 5], dim=1)], dim=1)
        assert x.ndim == x.dim() == 4
        return self.head(self.stage2(x).mean((2, 3)))


def test_loops_over_parts_and_questions_of_rank_leave_the_size_open() -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Chunked(), ["stem", "stage1"], init="perturb", example_input=small.EXAMPLE
    )
    assert not hne.traced.leaf_modules
    assert not hne.traced.limits.one_size
    assert treeify.verify(hne, torch.rand(2, 3, 12, 10)).worst <= 1


class SettingAView(small.SmallNet):
    """Sets a part of a view, and what it is a view of is not read again."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1[:2](self.stem(x)).permute(0, 2, 3, 1)
        x[:, 0] = 0.0
        return self.head(self.stage2(x.permute(0, 3, 1, 2)).mean((2, 3)))


class ByName(small.SmallNet):
    """Gives all arguments by name to functions whose first is not called `input`."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        x = torch.where(condition=x > 0, input=x, other=0.1 * x)
        edges = torch.tensor([0.1, 0.2], dtype=x.dtype)
        x = x + torch.searchsorted(sorted_sequence=edges, input=x.detach().contiguous())
        return self.head(F.dropout(input=self.stage2(x), p=0.0).mean((2, 3)))


class MadeInForward(small.SmallNet):
    """Calls modules that it makes in forward, of its own layers or of none."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Sequential(self.stem, self.stage1[:2])(x)
        x = self.stage2(nn.GELU()(x) * nn.Softmax(dim=1)(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("model", [SettingAView, ByName, MadeInForward])
def test_traced_and_right(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        model(), ["stem", "stage2"], init="perturb", example_input=small.EXAMPLE
    )
    assert not hne.traced.leaf_modules
    assert treeify.verify(hne, small.images(2)).worst <= 1


@register_notrace_module
class Marked(nn.Module):
    """Could be traced into, and its author does not want that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_module_marked_by_its_author_is_a_leaf_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Marked(), nn.Flatten(), nn.Linear(4 * 64, 3))
    traced = trace_model(model, example_input=small.EXAMPLE)
    for graph in traced.graphs.values():
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        assert calls == ["0", "1", "2", "3"]


def test_threads_trace_at_once_while_others_run() -> None:
    """fx patches `nn.Module` for all threads: nothing of it stays, and nobody else is recorded."""
    module_call = nn.Module.__call__
    models = [small.SmallNet() for _ in range(6)]  # here: threads draw from one generator
    model, x = small.SmallNet().eval(), small.images()
    expected = model(x)
    ended = threading.Event()
    differing: list[bool] = []

    def run() -> None:
        while not ended.is_set():
            differing.append(not torch.equal(model(x), expected))

    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(run)
        try:
            graphs = list(pool.map(lambda each: trace(each, small.EXAMPLE).graphs, models))
        finally:
            ended.set()
        running.result()
    assert len(differing) > 1
    assert not any(differing)
    assert nn.Module.__call__ is module_call
    assert len({str(graph[False]) for graph in graphs}) == 1
