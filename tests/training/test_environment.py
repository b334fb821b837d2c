"""What a run depends on, written and read."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from treeify.training.environment import PACKAGES, Environment
from treeify.training.run_directory import RunDirectory

SAVED = Path(__file__).parents[1] / "saved" / "run"


def test_an_environment_has_the_keys_of_saved_runs() -> None:
    environment = asdict(Environment.of(torch.device("cpu")))
    saved = json.loads((SAVED / "environment.json").read_text())
    assert list(environment) == list(saved)
    assert list(environment["versions"]) == list(saved["versions"]) == list(PACKAGES)
    assert (environment["device"], environment["gpu"]) == ("cpu", None)


def test_a_saved_environment_is_read() -> None:
    environment = RunDirectory(SAVED).environment()
    assert asdict(environment) == json.loads((SAVED / "environment.json").read_text())
