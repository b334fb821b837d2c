"""A saved ensemble's `config.json` with anything changed: the same answers, or one message."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from faults.fuzzing import MANY, edited, edits, fuzzed, outcome, paths, replaced, values
from hypothesis import strategies as st
from torch.testing import assert_close

import treeify
from treeify.conversion import checksums
from treeify.conversion.saved_config import CONFIG

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# What may stand in other places than it should.
FITTING = ["stage1:2", "stage2:3", "stage1", "input", "head:2", [3, 8, 8], [3, 16, 16], "packed"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble, `whole`, and its copy, `damaged`."""
    path = tmp_path_factory.mktemp("configs")
    hne = small.ensemble()
    hne.preparation = treeify.data.Preparation(size=(8, 8), mean=(0.5,), std=(0.5,))
    hne.calibrate(IMAGES, repeats=2)
    treeify.save(hne, path / "whole")
    shutil.copytree(path / "whole", path / "damaged")
    return path


structures = st.tuples(paths, values | st.sampled_from(FITTING))


@cache
def expected(here: Path) -> torch.Tensor:
    """What the ensemble answers."""
    return treeify.load(here / "whole", model=small.build())(IMAGES)


def check(here: Path, text: bytes) -> None:
    """Load from a configuration; what loads has the same weights, and so gives the same answers."""
    (here / "damaged" / CONFIG).write_bytes(text)
    hne = outcome(lambda: treeify.load(here / "damaged", model=small.build()))
    if hne is not None:
        with torch.inference_mode():
            answers = outcome(lambda: hne(IMAGES))
            assert answers is not None
            assert_close(answers, expected(here), rtol=1e-4, atol=1e-5)


@cache
def unsealed(here: Path) -> bytes:
    """The configuration without checksums, which would refuse every change."""
    config = json.loads((here / "whole" / CONFIG).read_text())
    del config[checksums.FILES], config[checksums.SEAL]
    return json.dumps(config, indent=2).encode()


def check_structure(here: Path, change: tuple[Any, Any]) -> None:
    check(here, json.dumps(replaced(json.loads(unsealed(here)), *change)).encode())


def check_text(here: Path, changes: Any) -> None:
    check(here, edited(unsealed(here), changes))


@fuzzed(40, change=structures)
def test_a_value_of_a_configuration_is_another(here: Path, change: tuple[Any, Any]) -> None:
    check_structure(here, change)


@fuzzed(40, changes=edits)
def test_a_configuration_with_any_bytes_changed(here: Path, changes: Any) -> None:
    check_text(here, changes)


@fuzzed(MANY, change=structures)
def test_ten_thousand_values(here: Path, change: tuple[Any, Any]) -> None:
    check_structure(here, change)


@fuzzed(MANY, changes=edits)
def test_ten_thousand_texts(here: Path, changes: Any) -> None:
    check_text(here, changes)
