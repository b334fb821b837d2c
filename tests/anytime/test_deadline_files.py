"""Latencies are saved with the ensemble, and damaged ones refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
from edited import edited
from torch.testing import assert_close

import treeify
from treeify.errors import CheckpointError


def _without_transitions(latencies: dict[str, Any]) -> None:
    """What earlier versions saved."""
    del latencies["transitions"]
    latencies["typical"] = latencies["slow"] = [0.1, 0.2, 0.3]


def _without_one(latencies: dict[str, Any]) -> None:
    del latencies["transitions"][2]


def _without_margin(latencies: dict[str, Any]) -> None:
    del latencies["transitions"][1]["margin"]


@pytest.mark.parametrize("damage", [_without_transitions, _without_one, _without_margin])
def test_latencies_that_lack_something_are_refused(
    damage: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    hne = small.ensemble()
    hne.calibrate(small.images(), repeats=2)
    treeify.save(hne, tmp_path / "hne")
    file = tmp_path / "hne" / "config.json"
    with edited(file) as config:
        damage(config["latencies"][0])
    with pytest.raises(CheckpointError, match=r"(?s)measurements.*treeify calibrate"):
        treeify.load(tmp_path / "hne", model=small.SmallNet())


def test_latencies_are_saved_and_loaded(tmp_path: Path) -> None:
    hne, x = small.ensemble(), small.images()
    latencies = hne.calibrate(x, repeats=2)
    treeify.save(hne, tmp_path / "hne")
    again = treeify.load(tmp_path / "hne", model=small.SmallNet())
    assert again.latencies == {latencies.situation: latencies}
    assert_close(again.predict(x, deadline=100.0).logits, hne.predict(x).detach())
