"""Files of tensors with anything changed: tensors, or one message."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from faults.fuzzing import MANY, edited, edits, fuzzed, outcome
from hostile import unseal
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import treeify
from treeify.conversion.saved_config import WEIGHTS
from treeify.models.load_weights import load_into
from treeify.models.weights import Weights, read_weights

TENSORS = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
SPLITS = ["stage1", "stage2:3"]
PARAMETERS = dict(small.build(10).named_parameters()).keys()
DTYPES = [torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64, torch.uint8]


def pickled(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


WHOLE = [
    save(TENSORS),
    pickled(TENSORS),
    pickled({"state_dict": TENSORS, "epoch": 3, "args": None}),
    pickled(TENSORS, _use_new_zipfile_serialization=False),
    pickle.dumps({"a": [1, 2]}),
]
contents = st.one_of(
    st.tuples(st.sampled_from(WHOLE), edits).map(lambda pair: edited(*pair)),
    st.binary(max_size=100),
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble, `whole`, and its copy, `damaged`."""
    path = tmp_path_factory.mktemp("tensors")
    hne = treeify.hierarchicalize(
        small.build(10), SPLITS, init="fresh", example_input=torch.zeros(1, 3, 8, 8)
    )
    treeify.save(hne, path / "whole")
    shutil.copytree(path / "whole", path / "damaged")
    unseal(path / "damaged")  # checksums would refuse every change
    return path


def check_weights(here: Path, content: bytes) -> None:
    file = here / "weights.bin"
    file.write_bytes(content)
    weights = outcome(lambda: read_weights(file))
    if weights is not None:
        assert isinstance(weights, Weights)
        assert all(isinstance(tensor, Tensor) for tensor in weights.state.values())
        model = nn.Linear(4, 3)
        if outcome(lambda: load_into(model, weights)) is not None:
            assert model.weight.dtype == torch.float32


# What becomes of a tensor of an ensemble, by name.
CHANGES: dict[str, Any] = {
    **{str(dtype): lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in DTYPES},
    "scalar": lambda tensor: tensor.flatten()[0].clone(),
    "empty": lambda tensor: tensor[:0].clone(),
    "row less": lambda tensor: tensor[1:].clone(),
    "dim more": lambda tensor: tensor[None].clone(),
    "flat": lambda tensor: tensor.flatten(),
    "as it is": lambda tensor: tensor,
}
NAMES = ["", "constant x", "constant stem.0.__class__", "constant ", "buffer x", "buffer ", "\x1b"]


def check_ensemble(here: Path, place: float, change: str, name: str | None) -> None:
    tensors = load_file(here / "whole" / WEIGHTS)
    key = list(tensors)[int(place * len(tensors))]
    original = tensors.pop(key)
    tensor = CHANGES[change](original)
    with safe_open(here / "whole" / WEIGHTS, "pt") as reader:
        metadata = reader.metadata()
    file = here / "damaged" / WEIGHTS
    save_file({**tensors, key if name is None else name: tensor}, file, metadata=metadata)
    hne = outcome(lambda: treeify.load(here / "damaged", model=small.build(10)))
    if hne is not None:  # a precision that computes, or nothing was changed
        assert tensor.shape == original.shape
        assert tensor.is_floating_point() or tensor.dtype == original.dtype
        assert dict(hne.named_parameters()).keys() == PARAMETERS


changes = {
    "place": st.floats(0, 1, exclude_max=True),
    "change": st.sampled_from(list(CHANGES)),
    "name": st.none() | st.sampled_from(NAMES),
}


@fuzzed(150, content=contents)
def test_a_file_of_weights_of_any_content(here: Path, content: bytes) -> None:
    check_weights(here, content)


@fuzzed(30, **changes)
def test_an_ensemble_of_which_a_tensor_is_another(
    here: Path, place: float, change: str, name: str | None
) -> None:
    check_ensemble(here, place, change, name)


@fuzzed(MANY, content=contents)
def test_ten_thousand_files_of_weights(here: Path, content: bytes) -> None:
    check_weights(here, content)


@fuzzed(MANY, **changes)
def test_ten_thousand_changes_of_a_tensor(
    here: Path, place: float, change: str, name: str | None
) -> None:
    check_ensemble(here, place, change, name)
