"""Properties of steps, in PyTorch: they are the ensemble, cut into parts that share no weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import treeify
from treeify.deploy.dense import exported
from treeify.deploy.dense_steps import Step, StepPlans, steps
from treeify.errors import ExportError, LeafError
from treeify.parity.tolerance import deviation, scale_of

# What decides by the values of images has no graph.
REFUSED = {
    "odd-OpaqueSubclasses": "y.flip(1) if all of y is finite",
    "odd-Views": "other values where the sum is large",
}
# One level's weights are another's too: each step that needs them has a copy.
SHARING = "odd-SharedWeights"
# What goes, per number in a running mean, where every batch norm is folded: a scale, if the
# convolution has no bias of its own; else a shift too.
FOLDED = {"resnet18-thin": 1, "odd-InPlace": 1, "vgg11_bn-thin": 2, "vit_b_16-thin": 0}
# A few of each kind and tree by default; further ones on CI, and those of minutes on request.
_DEFAULT = {
    *(("odd-InPlace", "binary"), ("odd-ManyOutputs", "wide"), ("resnet18-thin", "input")),
}
_THOROUGH = {"wide": ("odd-", "resnet18-thin", "vgg", "vit_b", "mixer"), "input": ("odd-Many",)}


def cases() -> Iterator[Any]:
    """Models and tree shapes."""
    for case in (each for each in zoo.cases() if each.name not in REFUSED):
        for shape in case.shapes:
            if (case.name, shape) in _DEFAULT:
                marks = []
            elif case.name.startswith(_THOROUGH.get(shape, ())):
                marks = [pytest.mark.thorough]
            else:
                marks = [pytest.mark.slow]
            yield pytest.param(case, shape, id=f"{case.name}-{shape}", marks=marks)


@pytest.mark.parametrize(("case", "shape"), list(cases()))
def test_steps_are_the_ensemble(case: zoo.Case, shape: str) -> None:
    hne = ensemble(case, shape)
    state = {key: tensor.clone() for key, tensor in hne.state_dict().items()}
    plans = StepPlans(hne)
    for sizes in subsets(hne.tree.nested_sizes):
        chain = plans.steps(sizes)
        assert tuple(step.leaves for step in chain) == tuple(sizes)
        for count in (1, 3):
            check_chain(hne, chain, case.images(count))
    chain = plans.steps(hne.tree.nested_sizes)
    check_traced(chain)
    if case.name != SHARING:
        check_parameters(hne, chain, FOLDED.get(case.name))
        check_weights_are_apart(hne, plans, chain)
    assert all(torch.equal(tensor, state[key]) for key, tensor in hne.state_dict().items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_say_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (case,) = (case for case in zoo.cases() if case.name == name)
    with pytest.raises(ExportError, match="cannot follow the model"):
        steps(ensemble(case, "input"))
    assert "forward" not in "".join(capfd.readouterr())


def test_sizes_where_no_step_ends_are_refused() -> None:
    (case,) = (case for case in zoo.cases() if case.name == "odd-InPlace")
    hne = ensemble(case, "wide")
    for sizes, message in {(3,): "no step ends at 3", (4, 1): "do not increase"}.items():
        with pytest.raises(LeafError, match=message):
            steps(hne, sizes)


class Quadrants(nn.Module):
    """What it computes of an image depends on the size that it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        height, width = x.shape[-2:]
        x = self.body(x[..., : height // 2, : width // 2]) * (height / width)
        return self.head(x.mean((2, 3)))


def test_steps_for_images_of_another_size_are_those_of_the_converted_model() -> None:
    hne = treeify.hierarchicalize(
        Quadrants(), ["body"], init="perturb", example_input=torch.zeros(1, 3, 8, 8)
    ).eval()
    chain = steps(hne, input_size=(20, 12))
    assert chain[0].examples[0].shape[-2:] == (20, 12)
    check_chain(hne, chain, torch.rand(3, 3, 20, 12))


def ensemble(case: zoo.Case, shape: str) -> treeify.HierarchicalEnsemble:
    """A case in evaluation mode, with other weights in every branch."""
    x = torch.zeros(1, 3, case.size, case.size)
    return treeify.hierarchicalize(
        case.model(), case.splits(shape), init="perturb", example_input=x
    ).eval()


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@torch.no_grad()
def check_chain(hne: treeify.HierarchicalEnsemble, chain: Sequence[Step], x: Tensor) -> None:
    """Each step gives the new leaves' outputs of a session, and changes none of its arguments."""
    session, values = hne.session(x), {"images": x.clone()}
    for step in chain:
        arguments = [values[name] for name in step.inputs]
        before = [argument.clone() for argument in arguments]
        results = step(*arguments)
        assert len(results) == len(step.outputs)
        for name, argument, old in zip(step.inputs, arguments, before, strict=True):
            assert torch.equal(argument, old), f"{name} has changed"
        values |= zip(step.outputs, results, strict=True)
        session.advance(to=step.leaves)
        for result, every in zip(results, tensors(session.leaf_logits), strict=False):
            dim = min(1, every.ndim - 1)
            expected = every.narrow(dim, step.start, step.leaves - step.start)
            assert result.shape == expected.shape
            assert deviation(result, expected, scale_of(expected)) <= 1, step


def check_traced(chain: Sequence[Step]) -> None:
    """`torch.export` follows each step, for any number of images."""
    for step in chain:
        program = exported(
            lambda step=step: step, list(step.examples), list(step.batch_dims), dynamic=True
        )
        names = program.graph_signature.user_outputs
        assert len(names) == len(step.outputs)


def check_parameters(
    hne: treeify.HierarchicalEnsemble, chain: Sequence[Step], folded: int | None
) -> None:
    """All steps together are as large as the ensemble, but for norms that are folded."""
    dense = sum(
        buffer.numel() for step in chain for buffer in step.buffers() if buffer.is_floating_point()
    )
    means = sum(
        tensor.numel() for key, tensor in hne.packed_tensors.items() if key.endswith("running_mean")
    )
    difference = dense - hne.count_parameters()
    if folded is not None:
        assert difference == -folded * means
    # Norms that are not folded bring their statistics, and products of weights are one of them.
    assert abs(difference) <= 2 * means + 0.02 * hne.count_parameters()


@torch.no_grad()
def check_weights_are_apart(
    hne: treeify.HierarchicalEnsemble, plans: StepPlans, chain: Sequence[Step]
) -> None:
    """Other weights of a branch change buffers of the step alone that computes it."""
    for level, branch in branches(hne):
        owner = [
            index
            for index, step in enumerate(chain)
            if any(call[0] == level and branch in range(*call[1]) for call in step.calls.values())
        ]
        assert len(owner) == 1
        old = {key: tensor.clone() for key, tensor in hne.packed_tensors.items()}
        for key, tensor in hne.packed_tensors.items():
            if hne.level_of(key) == level and tensor.is_floating_point():
                width = len(tensor) // hne.tree.branches[level]
                tensor.narrow(0, branch * width, width).mul_(1.25)
        changed = [
            index
            for index, pair in enumerate(zip(chain, plans.steps(sizes_of(chain)), strict=True))
            if not have_equal_buffers(*pair)
        ]
        for key, tensor in hne.packed_tensors.items():
            tensor.copy_(old[key])
        assert changed == owner, f"branch {branch} of level {level}"


def branches(hne: treeify.HierarchicalEnsemble) -> Iterator[tuple[int, int]]:
    """The first and the last branch of every level that has weights."""
    for level in sorted({hne.level_of(key) for key in hne.packed_tensors}):
        last = hne.tree.branches[level] - 1
        yield from ((level, branch) for branch in sorted({0, last}))


def sizes_of(chain: Sequence[Step]) -> list[int]:
    return [step.leaves for step in chain]


def have_equal_buffers(one: Step, other: Step) -> bool:
    pairs = zip(one.buffers(), other.buffers(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def subsets(sizes: Sequence[int]) -> list[Sequence[int]]:
    """All sizes, the first and last alone, every other one."""
    chosen = [tuple(sizes), (sizes[0], sizes[-1]), (sizes[-1],), tuple(sizes[::2])]
    return list(dict.fromkeys(chosen))
