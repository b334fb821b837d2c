"""Which hooks change what is computed."""

import copy

import pytest
import torch
from torch import nn

from treeify.errors import InputError
from treeify.tracing.hooks import changing_hooks, has_hooks, hooks_in, leave_hooks

X = torch.randn(1, 3, 4, 4)


def test_hooks_are_told_apart_by_running_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    model[0].register_forward_hook(lambda m, i, o: None)
    model[0].register_forward_hook(lambda m, i, o: o)
    model[1].register_forward_hook(lambda m, i, o: o + 1)
    model[2][0].register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    assert len(hooks_in(model)) == 4
    changing = changing_hooks(model, X, copy.deepcopy)
    assert [(hook.path, hook.table) for hook in changing] == [
        ("1", "_forward_hooks"),
        ("2.0", "_backward_hooks"),
    ]
    assert "test_hooks.py" in changing[0].name
    leave_hooks(model, changing)
    assert [hook.path for hook in hooks_in(model)] == ["1", "2.0"]
    assert not has_hooks(model[0])
    assert has_hooks(model[2])


def test_a_model_that_does_not_run_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    model[0].register_forward_hook(lambda m, i, o: None)
    with pytest.raises(InputError, match="does not run on the example, on which its hooks"):
        changing_hooks(model, X, copy.deepcopy)
