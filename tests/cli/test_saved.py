"""What a directory on the command line holds."""

from pathlib import Path

import pytest

from treeify.cli.saved import checkpoint_in, preparation_in
from treeify.errors import InputError

SAVED = Path(__file__).parents[1] / "saved"


def test_a_runs_ensemble_sees_what_its_recipe_says() -> None:
    preparation = preparation_in(checkpoint_in(SAVED / "run"))
    assert str(preparation).endswith("(held-out images of digits, from the run's recipe)")


def test_an_ensemble_by_itself_sees_what_is_known_of_its_architecture() -> None:
    assert "(pixels in 0 to 1: --mean, --std)" in str(preparation_in(SAVED / "ensemble"))
    preparation = preparation_in(SAVED / "ensemble", (0.5,), (0.25,))
    assert (preparation.mean, preparation.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(InputError, match="--std was given alone"):
        preparation_in(SAVED / "ensemble", std=(0.25,))
