"""What a directory on the command line holds."""

from pathlib import Path

import pytest

from treeify.cli.saved import checkpoint_in, preparation_in
from treeify.errors import InputError

SAVED = Path(__file__).parents[1] / "saved"


def test_a_runs_ensemble_sees_what_its_recipe_says() -> None:
    preparation = preparation_in(checkpoint_in(SAVED / "run"))
    assert str(preparation).endswith("(held-out images of digits, from the run's recipe)")


def test_of_an_ensemble_by_itself_the_shape_is_known_and_the_user_says_the_rest() -> None:
    preparation = preparation_in(SAVED / "ensemble")
    assert not preparation.is_known
    assert preparation.shape == (3, 8, 8)
    preparation = preparation_in(SAVED / "ensemble", (0.5,), (0.25,), (8, 16))
    assert (preparation.mean, preparation.std) == ((0.5,) * 3, (0.25,) * 3)
    assert preparation.size == (8, 16)
    with pytest.raises(InputError, match="std was given alone"):
        preparation_in(SAVED / "ensemble", std=(0.25,))
