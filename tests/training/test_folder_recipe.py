"""The recipe that a folder of images gets."""

from pathlib import Path

import pytest
import runs

from treeify.training.folder_recipe import folder_recipe

MODELS = """
import small

def oblong(num_classes=2):
    model = small.SmallNet(num_classes)
    model.image_size = (16, 24)
    return model
"""


def test_images_are_as_the_model_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "oblong_nets.py").write_text(MODELS)
    runs.photos(tmp_path / "photos", size=20, each=1)
    sizes = [
        folder_recipe(Path("photos"), model).data.options["size"]
        for model in ("oblong_nets:oblong", "test_resnet")
    ]
    assert sizes == [[16, 24], [160, 160]]
