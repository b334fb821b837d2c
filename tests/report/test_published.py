"""Published points: where they come from, and that nothing without a source is taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import treeify
from treeify.errors import DataError
from treeify.models.cifar_resnet import cifar_resnet50
from treeify.report.published import FILE, data_sets, published
from treeify.training.recipe_file import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def papers() -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = yaml.safe_load(FILE.read_text("utf-8"))
    return values


def test_every_series_has_points_and_a_source() -> None:
    assert data_sets() == ["cifar10", "cifar100", "imagenet"]
    every = [series for name in data_sets() for series in published(name)]
    assert len(every) == sum(len(paper["series"]) for paper in papers())
    assert len({(series.name, series.data_set, series.setting) for series in every}) == len(every)
    for series in every:
        macs, accuracies = zip(*series.points, strict=True)
        assert list(macs) == sorted(set(macs))
        assert macs[0] > 0
        assert all(0 < accuracy <= 100 for accuracy in accuracies)
        assert series.kind == "printed"
        assert str(series.source).rpartition(": ")[2]
    assert published("cifar10_jpeg") == []


@pytest.mark.parametrize("data_set", ["cifar10", "cifar100"])
@pytest.mark.parametrize(("name", "width"), [("HNE", 1.0), ("HNE_small", 0.5)])
def test_the_paper_s_networks_cost_what_is_counted_here(
    data_set: str, name: str, width: float
) -> None:
    net = cifar_resnet50(num_classes=int(data_set.removeprefix("cifar")), width=width)
    splits = load_recipe(RECIPES / "cifar_resnet_hne.yaml").model.splits
    x = torch.zeros(1, 3, 32, 32)
    hne = treeify.hierarchicalize(net, splits, init="copy", example_input=x)
    macs = [hne.count_macs(size) for size in hne.tree.nested_sizes]
    found = [own for own in published(data_set) if own.name.startswith(f"{name}, ")]
    assert len(found) == 3
    for series in found:
        assert [point[0] for point in series.points] == macs


def test_accuracies_of_table_1_are_those_of_the_recipes() -> None:
    recipes = {
        ("cifar100", "HNE"): "cifar_resnet_hne",
        ("cifar100", "HNE_small"): "cifar_resnet_hne_small",
        ("cifar10", "HNE"): "cifar10_resnet_hne",
        ("cifar10", "HNE_small"): "cifar10_resnet_hne_small",
    }
    for (data_set, name), recipe in recipes.items():
        found = next(own for own in published(data_set) if own.name == f"{name}, L_HD (paper)")
        line = " ".join(str(accuracy) for _, accuracy in found.points)
        assert line in (RECIPES / f"{recipe}.yaml").read_text("utf-8")


def series(**changes: Any) -> list[dict[str, Any]]:
    """One paper with one series, changed."""
    paper, entry = dict(papers()[0]), dict(papers()[0]["series"][0])
    for values in (paper, entry):
        values |= {key: value for key, value in changes.items() if key in values}
    return [{**paper, "series": [entry]}]


BAD: dict[str, Any] = {
    "no source": series(place=""),
    "blank source": series(paper="  "),
    "no venue": [{key: own for key, own in series()[0].items() if key != "venue"}],
    "a link to nowhere": series(link="somewhere"),
    "more than all images": series(accuracy=[91.7, 92.4, 93.2, 93.7, 100.4]),
    "fewer than no images": series(accuracy=[-1, 92.4, 93.2, 93.7, 94.0]),
    "no MACs": series(macs=[0, 2, 3, 4, 5]),
    "MACs that fall": series(macs=[1, 3, 2, 4, 5]),
    "as many as sizes": series(macs=[1, 2, 3, 4]),
    "no points": series(macs=[], accuracy=[]),
    "a data set of no recipe": series(data_set="CIFAR-10"),
    "another kind": series(kind="remembered"),
    "another setting": series(setting="best"),
    "another key": [{**series()[0], "note": "?"}],
    "no list": "points",
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_has_no_source_or_is_no_curve_is_refused(case: str, tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump(BAD[case]), encoding="utf-8")
    with pytest.raises(DataError, match=r"published\.yaml"):
        published("cifar10", file)


def test_a_good_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(series(name="mine", year=2030)), encoding="utf-8")
    (found,) = published("cifar10", file)
    assert found.name == "mine"
    assert "AAAI 2030: Table 1" in found.source
    with pytest.raises(DataError, match="nowhere"):
        published("cifar10", tmp_path / "nowhere.yaml")
