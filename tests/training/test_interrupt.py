"""Ctrl-C in the middle of a run."""

import signal

import pytest
import runs
import torch
from torch.testing import assert_close

import treeify
from treeify.training import state_file
from treeify.training.events import Reporter, Step
from treeify.training.recipe import Recipe
from treeify.training.trainer import train


@pytest.mark.parametrize(("step", "epochs"), [(2, 0), (runs.TINY_STEPS + 1, 1)])
def test_ctrl_c_finishes_the_step_and_saves(recipe: Recipe, step: int, epochs: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    result = train(recipe, reporter=runs.InterruptAt(step))
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    assert (result.last.epoch if result.last else 0) == epochs
    last = result.run.directory / "last"
    assert state_file.read_state(last)["step"] == step
    images = torch.zeros(2, 3, 8, 8)
    assert_close(treeify.load(last)(images), result.run.hne.eval()(images))


def test_a_second_ctrl_c_acts_at_once(recipe: Recipe) -> None:
    class Twice(Reporter):
        def stepped(self, step: Step) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, reporter=Twice())
