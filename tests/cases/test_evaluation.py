"""What people give an ensemble, ask of it, and compare it with (answers, scores, tables)."""

import numpy as np
import pytest
import small
import torch
from torch import Tensor

from treeify.errors import InputError

UNFIT = {
    "float64": (
        torch.rand(2, 3, 8, 8, dtype=torch.double),
        "torch.float64",
        r"x\.to\(torch.float32",
    ),
    "uint8": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8", "/ 255, normalised"),
    "half": (torch.rand(2, 3, 8, 8).half(), "torch.float16", r"x\.to\(torch.float32"),
    "numpy": (np.zeros((2, 3, 8, 8), np.float32), "numpy.ndarray", r"torch\.from_numpy"),
    "one image": (torch.rand(3, 8, 8), r"shape \(3, 8, 8\)", r"x\[None\]"),
}


@pytest.mark.parametrize(("x", "found", "remedy"), UNFIT.values(), ids=UNFIT)
def test_images_of_another_dtype_are_refused_with_the_way_out(
    x: Tensor, found: str, remedy: str
) -> None:
    hne = small.ensemble()
    calls = (hne, hne.predict, hne.session, hne.calibrate, hne.tune)
    for call in (*calls, lambda x: next(hne.anytime(x)), lambda x: hne.predict(x, deadline=1.0)):
        with pytest.raises(InputError, match=rf"(?s)Found {found}.*{remedy}"):
            call(x)
    hne.train()
    with pytest.raises(InputError, match=found):
        hne(x)
    assert hne.training


def test_a_model_that_converts_images_itself_takes_any() -> None:
    class Scaled(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    hne = small.converted(Scaled(), ["stage1"]).eval()
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(hne(x), hne(x.double()))
    torch.testing.assert_close(hne(x), hne(x.float()))


def test_half_precision_images_under_autocast_are_right() -> None:
    hne, x = small.ensemble(), small.images()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hne(x.bfloat16()), hne(x.bfloat16().float()))
    with pytest.raises(InputError, match=r"torch\.bfloat16"):
        hne(x.bfloat16())
    assert hne.double()(x.double()).dtype == torch.double
    with pytest.raises(InputError, match=r"Expected torch\.float64"):
        hne(x)
