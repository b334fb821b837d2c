"""What is kept of answers: images small enough for a page, and nothing of those that stay."""

import base64
import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import treeify
from treeify.data import Data, Preparation
from treeify.report.answers import answers_of

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)


def ensemble(size: int) -> treeify.HierarchicalEnsemble:
    """Two leaves: the first answers by the mean of the pixels, the second the other way round."""

    class Sign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)))

    x = torch.zeros(1, 3, size, size)
    hne = treeify.hierarchicalize(Sign(), ["input"], init="fresh", example_input=x).eval()
    with torch.no_grad():
        hne.head.bias.zero_()
        first = torch.tensor([[-1.0], [1.0]]).expand(2, 3)
        hne.head.weight.copy_(torch.cat([first, -3 * first]))
    return hne


def decoded(url: str, kind: str) -> Image.Image:
    start = f"data:image/{kind};base64,"
    assert url.startswith(start)
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix(start))))


@pytest.mark.parametrize(("size", "kind"), [(8, "png"), (160, "jpeg")])
def test_changed_images_are_kept_as_they_were_before_normalisation(size: int, kind: str) -> None:
    preparation = Preparation((size, size), MEAN, STD)
    pixels = torch.full((3, size, size), 0.9)
    pixels[0] = 0.8
    x = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    # Above the mean: the first leaf says 1, both together say 0.
    examples: Any = [(x, 1)] * 9 + [(x, 0)] * 2
    data = Data(examples, examples, ("zero", "one"), "11 images", preparation)
    batches = [(torch.stack([x] * 11), torch.tensor([1] * 9 + [0] * 2))]
    answers = answers_of(ensemble(size), batches, data)
    assert answers.nested.tolist() == [[1] * 11, [0] * 11]
    assert [score.accuracy for score in answers.scores] == pytest.approx([900 / 11, 200 / 11])
    kept = [(each.target, each.before, each.after, each.size) for each in answers.thumbnails]
    assert kept == [("zero", "one", "zero", 2)] * 2 + [("one", "one", "zero", 2)] * 4
    image = decoded(answers.thumbnails[0].url, kind)
    assert image.size == (min(size, 64),) * 2
    for found, expected in zip(image.convert("RGB").getpixel((3, 3)), (204, 230, 230), strict=True):
        assert abs(found - expected) <= 3


def test_where_nothing_is_known_of_pixels_no_images_are_kept() -> None:
    x = torch.rand(4, 3, 8, 8)
    examples: Any = [(image, 1) for image in x]
    data = Data(examples, examples, ("zero", "one"), "4 images")
    answers = answers_of(ensemble(8), [(x, torch.ones(4, dtype=torch.long))], data)
    assert answers.thumbnails == ()
    assert answers.preparation is None
