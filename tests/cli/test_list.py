"""`treeify list`: which models it shows, and what it says it does not know."""

import json
from pathlib import Path
from typing import Any

import pytest
from runner import run

from treeify.models.builders import library_names
from treeify.parity import results
from treeify.parity.results import Row

NAMES = ["resnet10t", "resnet18", "swin_tiny", "torchvision/resnet18"]


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four models in the libraries: one without a row, one that does not convert."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("treeify.cli.list.library_names", lambda: NAMES)
    monkeypatch.setattr("treeify.parity.results.SHIPPED", tmp_path / "none")
    numbers: dict[str, Any] = {"how": "full", "deviations": {"prefix": 0.1}}
    for name, fields in {
        "resnet18": {
            **numbers,
            "family": "resnet",
            "parameters": 11_000_000,
            "macs": 1_800_000_000,
            "packed_share": 0.987,
        },
        "swin_tiny": {"family": "swin", "failure": "TraceError: it cannot be traced"},
        "torchvision/resnet18": {
            "family": "torchvision/resnet",
            "parameters": 12_000_000,
            "macs": 1_700_000_000,
            "packed_share": 0.5,
            "how": "meta",
        },
    }.items():
        row = Row(name=name, versions=results.versions(), asked="2", **fields)
        results.append(Path("rows.jsonl"), row)


def listed(*words: str) -> dict[str, Any]:
    result = run("list", *words, "--coverage", "rows.jsonl", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def names(*words: str) -> list[str]:
    return [model["name"] for model in listed(*words)["models"]]


def test_the_table_shows_what_is_known_and_says_what_is_not() -> None:
    result = run("list", "--coverage", "rows.jsonl")
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    assert "swin_tiny" not in lines
    for part in ("resnet", "11M", "1.8G", "98.7%", "full"):
        assert part in lines["resnet18"]
    assert "meta: shapes only" in lines["torchvision/resnet18"]
    assert lines["resnet10t"].count("?") == 3
    assert "3 models." in result.stdout
    assert "1 of them were never checked: treeify verify NAME does it." in result.stdout
    assert "1 did not convert: swin_tiny" in result.stdout


def test_wildcards_families_and_limits_choose() -> None:
    assert names() == ["resnet10t", "resnet18", "torchvision/resnet18"]
    assert names("resnet*") == ["resnet10t", "resnet18"]
    assert names("timm/resnet18") == ["resnet18"]
    assert names("timm/*18") == ["resnet18"]
    assert names("timm/*") == ["resnet10t", "resnet18"]
    assert names("t*") == names("*/*") == ["torchvision/resnet18"]
    assert names("torchvision/*") == ["torchvision/resnet18"]
    assert names("--family", "resnet") == ["resnet10t", "resnet18"]
    assert names("--family", "torchvision/*") == ["torchvision/resnet18"]
    assert names("--max-params", "11.5M") == ["resnet18"]
    assert names("--max-params", "11M") == ["resnet18"]
    assert names("--max-macs", "1.75G") == ["torchvision/resnet18"]
    assert names("--max-macs", "1k") == []


def test_json_holds_the_same() -> None:
    found = listed()
    assert found["not_checked"] == ["resnet10t"]
    assert found["failed"] == ["swin_tiny"]
    unknown, known, _ = found["models"]
    assert unknown["family"] == "resnet"
    assert unknown["packed_share"] is None
    assert not unknown["proven"]
    assert known["packed_share"] == 0.987
    assert known["proven"]


def test_a_limit_leaves_out_what_is_unknown_and_says_so() -> None:
    result = run("list", "--coverage", "rows.jsonl", "--max-params", "20M")
    assert "2 models." in result.stdout
    assert "1 more were never checked, so their size is unknown." in result.stdout


def test_without_any_data_the_names_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.cli.list.library_names", library_names)
    result = run("list", "resnet18*")
    assert result.exit_code == 0, result.output
    assert "2 of them were never checked" in result.stdout


def test_rows_of_other_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {**results.versions(), "timm": "0.1"}
    for name in ("resnet10t", "resnet_gone", "my_package:net"):
        fields: dict[str, Any] = {"family": "resnet", "packed_share": 1.0, "how": "full"}
        results.append(Path("rows.jsonl"), Row(name=name, versions=older, asked="2", **fields))
    found = listed("*e*")
    assert "my_package:net" in [model["name"] for model in found["models"]]
    assert found["not_installed"] == ["resnet_gone"]
    result = run("list", "--coverage", "rows.jsonl")
    assert "resnet_gone" not in result.stdout
    assert "2 of them were checked under other versions: " in result.stdout
    assert "1 more that were checked are not in the installed libraries." in result.stdout


def test_a_missing_file_is_an_error() -> None:
    result = run("list", "--coverage", "nowhere.jsonl")
    assert result.exit_code == 2
    assert "nowhere.jsonl cannot be read" in result.stderr
