"""Data sets whose classes have names, and whose held-out images can be prepared otherwise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import images_of, labels_of
from PIL import Image

from treeify import data
from treeify.data.data_set import Data, Transformed, in_parts
from treeify.data.preparation import Preparation
from treeify.errors import DataError

PREPARATION = Preparation(size=(4, 4), mean=(0.0,), std=(1.0,))


def small(labels: list[int]) -> Data:
    """Grey pictures of three classes."""
    examples = [(Image.new("L", (4, 4), 50 * label), label) for label in labels]
    return in_parts(
        examples, examples, PREPARATION, PREPARATION, ("a", "b", "c"), "pictures", labels
    )


def test_the_report_names_classes_without_held_out_images() -> None:
    assert small([0, 1, 2]).split == "the 3 pictures held out"
    assert small([0, 2]).split == "the 2 pictures held out, none of 'b'"
    assert small([1]).preparation == replace(PREPARATION, classes=("a", "b", "c"))


def test_classes_go_to_other_numbers_by_name() -> None:
    pictures = small([0, 1, 2]).numbered_by(("c", "d", "b", "a"))
    assert labels_of(pictures.held_out) == labels_of(pictures.train) == [3, 2, 0]
    assert pictures.split.endswith("held out, none of 'd'")
    assert pictures.preparation is not None
    assert pictures.classes == pictures.preparation.classes == ("c", "d", "b", "a")
    with pytest.raises(DataError, match=r"does not know: 'b', 'c'"):
        small([0]).numbered_by(("a", "d"))
    same = small([0])
    assert same.numbered_by(("a", "b", "c")) is same


def test_held_out_images_are_prepared_otherwise_where_they_are_opened_here() -> None:
    wide = replace(PREPARATION, size=(4, 8), std=(0.5,), crop_mode="squash")
    pictures = small([0, 1]).prepared_by(wide)
    assert images_of(pictures.held_out).shape == (2, 3, 4, 8)
    assert images_of(pictures.train).shape == (2, 3, 4, 4)
    assert pictures.preparation == replace(wide, classes=("a", "b", "c"))
    own = Data([(torch.zeros(3, 4, 4), 0)], [(torch.zeros(3, 4, 4), 0)], ("a",), "one")
    assert own.prepared_by(wide) is own


def test_training_images_as_if_they_were_held_out() -> None:
    examples = [(Image.new("L", (4, 4), 50 * label), label) for label in range(3)]

    def augment(image: Image.Image) -> torch.Tensor:
        return -PREPARATION(image)

    data = in_parts(examples, examples, augment, PREPARATION, ("a", "b", "c"), "pictures")
    for renumbered in (data, data.numbered_by(("c", "b", "a"))):
        assert torch.equal(renumbered.unaugmented(2), PREPARATION(examples[2][0]))
    # What is prepared already stays so; who augments by itself gives that.
    prepared = [(torch.full((1, 4, 4), 0.5), 0)]
    inside = Data(Transformed(prepared, torch.neg), prepared, ("a", "b"), "one")
    assert torch.equal(inside.unaugmented(0), prepared[0][0])
    assert torch.equal(Data(prepared, prepared, ("a", "b"), "one").unaugmented(0), prepared[0][0])


@pytest.mark.parametrize("root", ["9" * 5000, "\0", "", 5, None])
@pytest.mark.parametrize("source", [data.image_folder, data.timm_dataset, data.cifar10])
def test_what_is_no_path_is_refused(source: Callable[..., data.Data], root: Any) -> None:
    with pytest.raises(DataError, match=r"root is (no path|of a wrong type)(.|\n)*Expected"):
        source(root=root)


def test_other_files_of_a_data_set_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class_map is no path"):
        data.timm_dataset(root=str(tmp_path), class_map="9" * 5000)
    with pytest.raises(DataError, match="cannot be read"):
        data.timm_dataset(root=str(tmp_path), train_split="9" * 5000)
    with pytest.raises(DataError, match="train_split is of a wrong type"):
        data.timm_dataset(root=str(tmp_path), train_split=10**5000)
    with pytest.raises(DataError, match="pattern of shards is of a wrong type"):
        data.webdataset(train=5, held_out="a", classes=2)
