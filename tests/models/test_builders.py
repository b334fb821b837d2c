"""Names find their builders; wrong ones are refused with the nearest."""

import sys
from pathlib import Path

import pytest

from treeify.errors import ModelError
from treeify.models import shallow
from treeify.models.architecture import Architecture
from treeify.models.builders import check_names, family, find_builder
from treeify.models.fingerprint import fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "Did you mean 'resnet50'"),
        ("timm/resnet5O", "Did you mean 'resnet50'"),
        ("googlenet", "Did you mean 'torchvision/googlenet'"),
        ("torchvision/resnet19", "'torchvision/resnet18'"),
        ("torchvision/fasterrcnn_resnet50_fpn", "there is no model"),
        ("", "there is no model"),
        ("no_such_package.models:small", "module 'no_such_package.models'"),
        ("odd_models:Groupped", "no function 'Groupped'(.|\n)*Did you mean 'Grouped'"),
        ("odd_models:WIDTH", "no function 'WIDTH'"),
        ("odd_models:", "no function ''"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Architecture(name).build()


def test_functions_build_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\n\ndef tiny(width=4):\n    return nn.Conv2d(3, width, 1)\n"
    (tmp_path / "tiny_models.py").write_text(source)
    (tmp_path / "broken_models.py").write_text("import no_such_thing\n")
    (tmp_path / "odd_results.py").write_text("def name():\n    return 'resnet'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Architecture("tiny_models:tiny", {"width": 6}).build().out_channels == 6
    with pytest.raises(ModelError, match="No module named 'no_such_thing'"):
        Architecture("broken_models:tiny").build()
    with pytest.raises(ModelError, match=r"builds no model(.|\n)*Found str 'resnet'"):
        Architecture("odd_results:name").build()
    for module in ("tiny_models", "broken_models", "odd_results"):
        sys.modules.pop(module, None)


def test_names_of_functions_that_have_moved_still_build() -> None:
    options = {"model": "resnet10t", "blocks": 1}
    model = Architecture("treeify.shallower:build", options).build()
    assert fingerprint(model) == fingerprint(Architecture(shallow.NAME, options).build())


def test_all_wrong_names_are_refused_at_once() -> None:
    check_names(["resnet18", "timm/resnet18", "torchvision/resnet18", "odd_models:Grouped"])
    with pytest.raises(ModelError, match=r"2 names are wrong(.|\n)*'resnet5O'(.|\n)*'Groupped'"):
        check_names(["resnet5O", "resnet18", "resnet5O", "odd_models:Groupped"])
    with pytest.raises(ModelError, match=r"^there is no model 'resnet5O'"):
        check_names(["resnet5O"])


def test_a_family_is_the_module_that_defines_a_model() -> None:
    names = (
        "resnet18",
        "timm/wide_resnet50_2",
        "torchvision/resnext50_32x4d",
        "odd_models:Grouped",
    )
    assert [family(name) for name in names] == [
        *("resnet", "resnet", "torchvision/resnet", "odd_models"),
    ]


@pytest.mark.parametrize("name", ["9" * 5000, "a/" * 3000, "torchvision/" + "9" * 5000, "\0", "."])
def test_a_name_that_no_file_can_have_is_no_model(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        find_builder(name)
