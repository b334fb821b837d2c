"""The card says what was measured, what was not, and nothing that a file smuggles in."""

import io
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

import treeify
from treeify.conversion.saving import save_measurements
from treeify.data import Preparation
from treeify.errors import printable
from treeify.share.card import card
from treeify.share.contents import read_contents
from treeify.share.subject import Subject
from treeify.training.run_directory import RunDirectory

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def card_of(directory: Path, out: Path, **options: Any) -> str:
    treeify.push(directory, "org/name", dry_run=True, out=out, **options)
    text = (out / "README.md").read_text(encoding="utf-8")
    ModelCard(text).validate  # noqa: B018 - reading it checks the YAML
    return text


def test_numbers_are_those_of_the_run(trained: Path, tmp_path: Path) -> None:
    text = card_of(trained, tmp_path / "out")
    last = RunDirectory(trained).metrics()[-1]
    hne = treeify.load(trained / "last")
    data = ModelCard(text).data
    assert data.library_name == "treeify"
    assert data.model_name == "name"
    assert len(last.held_out) == hne.tree.levels
    for score, result in zip(last.held_out, data.eval_results, strict=True):
        assert result.metric_value == pytest.approx(score.accuracy / 100, abs=1e-6)
        row = f"| {score.leaves} | {hne.count_macs(score.leaves):,} |"
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        assert f"| {score.accuracy:.2f} |" in line
    assert "Trained on the data set `digits`" in text
    assert "from random weights" in text
    assert "![Accuracy against MACs](trade_off.png)" in text
    with Image.open(tmp_path / "out" / "trade_off.png") as picture:
        assert min(picture.size) > 300


def test_what_was_not_measured_is_said(converted: Path, tmp_path: Path) -> None:
    text = card_of(converted, tmp_path / "out")
    assert ModelCard(text).data.eval_results is None
    for sentence in (
        "Its accuracy was not measured.",
        "There is no picture of accuracy against MACs",
        "What it was trained on is not known",
        "The names of the classes are not known.",
        "Nobody said under which licence",
        "Which trained weights it began with, if any, is not stated.",
        "How long answers take was not measured",
    ):
        assert sentence in text
    assert "accuracy %" not in text
    assert not (tmp_path / "out" / "trade_off.png").exists()


def test_what_the_user_says_is_in_it(converted: Path, tmp_path: Path) -> None:
    text = card_of(
        converted, tmp_path / "out", licence="apache-2.0", base_model="timm/test_resnet.r160_in1k"
    )
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("apache-2.0", "timm/test_resnet.r160_in1k")


def test_latencies_are_in_it(converted: Path, tmp_path: Path) -> None:
    hne = treeify.load(converted)
    treeify.save(hne, tmp_path / "mine")
    latencies = hne.calibrate(hne.example_images(1), repeats=10)
    save_measurements(hne, tmp_path / "mine")
    text = card_of(tmp_path / "mine", tmp_path / "out")
    assert f"| 2 | {1e3 * latencies.typical[0, 2]:.3g} |" in text


def test_a_base_model_is_named_by_its_recipe(trained: Path) -> None:
    contents = read_contents(trained, "name")
    assert contents.base_model is None
    model = {"name": "resnet18", "pretrained": True, "weights": None}
    fine_tuned = replace(contents, recipe={"model": model})
    assert fine_tuned.base_model == "timm/resnet18.a1_in1k"
    assert not fine_tuned.is_from_scratch
    own = replace(contents, recipe={"model": {**model, "pretrained": False, "weights": "net.pth"}})
    assert own.base_model is None
    assert not own.is_from_scratch


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("source", ["trained", "converted"])
def test_its_code_runs(
    source: str,
    request: pytest.FixtureRequest,
    hub: fake_hub.Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = request.getfixturevalue(source)
    treeify.push(directory, "org/name")
    Image.new("RGB", (50, 40)).save("photo.jpg")
    (code,) = CODE.findall(hub.repos["org/name"].files["README.md"].decode())
    assert 9 <= len(code.splitlines()) <= 11
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    lines = printed.getvalue().splitlines()
    hne = treeify.load("hf-hub:org/name")
    assert [int(line.split()[0]) for line in lines[:-2]] == list(hne.tree.nested_sizes)


def test_the_code_for_unprepared_images_runs(
    hub: fake_hub.Hub, converted: Path, tmp_path: Path, logged_in: None
) -> None:
    hne = treeify.load(converted)
    hne.preparation = Preparation(size=(32, 32))
    treeify.save(hne, tmp_path / "mine")
    treeify.push(tmp_path / "mine", "org/name")
    text = hub.repos["org/name"].files["README.md"].decode()
    (code,) = CODE.findall(text)
    assert "torch.zeros(1, 3, 32, 32)" in code
    exec(compile(code, "card", "exec"), {})


HOSTILE = (
    "---\nlicense: mit\n---",
    "</details><script>alert(1)</script>",
    "![x](https://example.org/x.png)",
    "a | b | c",
    "```\n# heading\n```",
    "\x1b[31mred",
    "'\"}: [",
    "&amp;",
    "日本語",
    "\u202egnp.exe",
)


def test_names_of_classes_break_nothing(converted: Path, tmp_path: Path) -> None:
    hne = treeify.load(converted)
    assert isinstance(hne.preparation, Preparation)
    hne.preparation = replace(hne.preparation, classes=HOSTILE, source=HOSTILE[0])
    treeify.save(hne, tmp_path / "mine")
    text = card_of(tmp_path / "mine", tmp_path / "out")
    plain = card_of(converted, tmp_path / "other")
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
    assert "<script>" not in text
    assert "https://example" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [line for line in plain.splitlines() if line.startswith("#")]
    assert text.count("```") == plain.count("```")
    assert "日本語" in text


def test_a_reader_of_markdown_sees_names_as_text(converted: Path, tmp_path: Path) -> None:
    hne = treeify.load(converted)
    assert isinstance(hne.preparation, Preparation)
    hne.preparation = replace(hne.preparation, classes=HOSTILE)
    treeify.save(hne, tmp_path / "mine")
    body = card_of(tmp_path / "mine", tmp_path / "out").split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "image", "link_open"}
    read = "".join(child.content for child in inline if child.type in ("text", "text_special"))
    shown = (printable(" ".join(name.split())) for name in HOSTILE)
    assert all(name in read for name in shown)


def test_scores_of_training_stand_in_for_data_that_are_gone(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"] = {"name": "image_folder", "root": "/nowhere/photos", "size": 8}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = card_of(tmp_path / "run", tmp_path / "out")
    assert "As training wrote them down after its last epoch" in text
    last = RunDirectory(trained).metrics()[-1].held_out[-1]
    assert f"| {last.accuracy:.2f} |" in text
    assert "/nowhere" not in text
    # The scores are of the newest state alone.
    other = sorted((tmp_path / "run" / "checkpoints").iterdir())[0]
    shutil.copytree(other, tmp_path / "run" / "checkpoints" / "step-00000001-epoch-0001")
    older = tmp_path / "run" / "checkpoints" / "step-00000001-epoch-0001"
    text = card_of(older, tmp_path / "older")
    assert "Its accuracy was not measured." in text
    assert "accuracy %" not in text
    assert not (tmp_path / "older" / "metrics.jsonl").exists()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_of_data_sets_break_nothing(hostile: str, trained: Path) -> None:
    contents = read_contents(trained, "name")
    result = replace(
        contents.result, data_set=hostile, origin={**contents.result.origin, "data": hostile}
    )
    hne = contents.hne
    subject = Subject(
        "org/name", result, hne.architecture, hne.example, hne.preparation, licence=hostile
    )
    text = card(subject)
    data = ModelCard(text).data
    assert data.license == hostile.replace("\r", "")
    assert {each.dataset_name for each in data.eval_results} == {hostile}
    # Code in a line shows what it is of: nothing in it is markup.
    body = re.sub(r"`[^`\n]*`", "", text.split("\n---\n", 1)[1])
    assert "<script>" not in body
    assert "![x]" not in body
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# name"]


def test_a_builder_of_ones_own_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),"
        " nn.Flatten(), nn.Linear(4, 5))\n"
    )
    example = torch.zeros(1, 3, 8, 8)
    hne = treeify.hierarchicalize("own_net:net", ["4"], init="fresh", example_input=example)
    treeify.save(hne, tmp_path / "mine")
    with pytest.raises(treeify.TreeifyError, match="would be imported"):
        treeify.push(tmp_path / "mine", "org/name", dry_run=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    text = card_of(tmp_path / "mine", tmp_path / "out", trust=True)
    assert 'treeify.load("hf-hub:org/name", trust=True)' in text
    assert "imports and calls `own_net:net`" in text
    assert "torch.zeros(1, 3, 8, 8)" in text
