"""The state of a run: every field is saved, and comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from treeify.errors import CheckpointError
from treeify.evaluation.metrics import Scores
from treeify.training.run_state import RunState
from treeify.training.state_file import VALUES, read_state, write_state
from treeify.tree import Tree

SAVED = Path(__file__).parents[1] / "saved" / "run" / "last"
TREE = Tree((2,))


def new_state() -> RunState:
    """The state of a run on 50 images that has not begun, of a network in channels_last."""
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return RunState(images=50, scores=Scores(TREE), optimizer=optimizer, scaler=None)


def trained_state() -> RunState:
    """The same after a step, with no field as it was."""
    state = new_state()
    for parameter in state.optimizer.param_groups[0]["params"]:
        parameter.grad = torch.rand_like(parameter)
    state.optimizer.step()
    state.scores.add(torch.rand(5, 2, 3), torch.arange(5) % 3)
    state.step, state.epochs, state.best, state.best_accuracy = 7, 3, "step-2", 12.5
    state.loss, state.skipped = 0.1 + 0.2, {"b.png", "a.png"}
    return state


def plain(value: Any) -> Any:
    """Tensors as lists, so that == compares them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_every_field_comes_back_from_a_file(tmp_path: Path) -> None:
    trained, resumed = trained_state(), new_state()
    before, fresh = plain(trained.state_dict()), plain(resumed.state_dict())
    unchanged = [key for key in before if before[key] == fresh[key]]
    assert unchanged == ["images", "scaler"]
    write_state(tmp_path, trained.state_dict())
    resumed.load_state_dict(read_state(tmp_path))
    assert plain(resumed.state_dict()) == before
    assert resumed.skipped == {"a.png", "b.png"}


def test_momenta_lie_in_memory_as_their_weights_do(tmp_path: Path) -> None:
    write_state(tmp_path, trained_state().state_dict())
    resumed = new_state()
    resumed.load_state_dict(read_state(tmp_path))
    weight = resumed.optimizer.param_groups[0]["params"][0]
    momentum = resumed.optimizer.state[weight]["momentum_buffer"]
    assert momentum.stride() == weight.stride() != weight.contiguous().stride()


def test_a_gradient_scaler_is_part_of_it() -> None:
    state, resumed = new_state(), new_state()
    state.scaler, resumed.scaler = (torch.amp.GradScaler("cpu", init_scale=n) for n in (8.0, 2.0))
    resumed.load_state_dict(state.state_dict())
    assert resumed.scaler.get_scale() == 8.0
    without = new_state()
    without.load_state_dict(state.state_dict())
    assert without.scaler is None


def test_other_groups_of_parameters_are_not_gone_on_with() -> None:
    state, resumed = trained_state(), new_state()
    weight, bias = resumed.optimizer.param_groups[0]["params"]
    resumed.optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [bias]}], lr=0.1)
    with pytest.raises(CheckpointError, match="another optimizer"):
        resumed.load_state_dict(state.state_dict())


def test_the_keys_are_those_of_saved_runs() -> None:
    pairs = json.loads((SAVED / VALUES).read_text())["pairs"]
    assert list(new_state().state_dict()) == [key for key, _ in pairs]
