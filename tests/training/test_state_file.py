"""States as plain values and tensors."""

from pathlib import Path

import pytest

from treeify.training import state_file


def test_states_are_plain_values_and_tensors(tmp_path: Path) -> None:
    import torch

    state = {
        "numbers": [1, 2.5, None, True, "text", float("inf")],
        3: {"deep": (torch.arange(3), torch.zeros((), dtype=torch.int64))},
        "double": 0.1 + 0.2,
        "tuple": (1, ("a", [2])),
    }
    state_file.write_state(tmp_path, state)
    found = state_file.read_state(tmp_path)
    assert found["numbers"] == state["numbers"]
    assert found["double"] == state["double"]
    assert found["tuple"] == state["tuple"]
    assert torch.equal(found[3]["deep"][0], torch.arange(3))
    assert found[3]["deep"][1].dtype == torch.int64
    with pytest.raises(TypeError, match="set"):
        state_file.write_state(tmp_path, {"bad": {1, 2}})
