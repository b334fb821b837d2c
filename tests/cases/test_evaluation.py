"""What people give an ensemble, ask of it, and compare it with (answers, scores, tables)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from cli import saved_ensembles as saved
from PIL import Image
from runner import run
from torch import Tensor, nn

import treeify
from treeify.data import digits
from treeify.errors import InputError
from treeify.models.architecture import Architecture

QUICK = ("--repeats", "10")

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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is, with `ensemble`, of 6 leaves for digits of 8 x 8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
    saved.save(tmp_path / "ensemble")
    return tmp_path


def reply(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def folders(root: Path, count: int = 2) -> None:
    """Class folders of 32 x 32 pictures, ten classes."""
    for part in ("train", "val"):
        for label in range(10):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.full((32, 32), 20 * label + number, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")


def test_eval_measures_at_the_size_the_ensemble_was_converted_for(here: Path) -> None:
    folders(here / "photos")
    hne = treeify.load("ensemble")
    data = ("--data", "name=image_folder", "--data", "root=photos", "--no-latency")
    found = reply("eval", "ensemble", *data)
    assert [row["macs"] for row in found["scores"]] == [hne.count_macs(n) for n in (1, 3, 6)]
    assert not any("converted for" in note for note in found["notes"])
    larger = reply("eval", "ensemble", *data, "--data", "size=16")
    assert larger["scores"][0]["macs"] > 3 * hne.count_macs(1)
    assert "Images of 3 x 16 x 16; the ensemble was converted for 3 x 8 x 8." in larger["notes"]


def test_thresholds_are_chosen_at_the_size_the_ensemble_was_converted_for(here: Path) -> None:
    folders(here / "photos")
    target = treeify.load("ensemble").count_macs(3)
    data = ("--data", "name=image_folder", "--data", "root=photos")
    reply("calibrate", "ensemble", "--target-macs", f"{target}", "--no-tune", *QUICK, *data)
    assert list(treeify.load("ensemble").budgets) == [target]


def test_eval_puts_the_base_model_first(here: Path) -> None:
    hne = treeify.load("ensemble")
    data = digits(crop_padding=1).held_out.tensors
    torch.save(hne.leaf(0).state_dict(), "base.pth")
    torch.save(hne.leaf(4).state_dict(), "other.pth")
    arguments = ("eval", "ensemble", "--data", "name=digits")
    found = reply(*arguments, "--base-weights", "other.pth")
    accuracy = (hne.leaf(4).eval()(data[0]).argmax(1) == data[1]).double().mean().item()
    assert found["base"]["accuracy"] == pytest.approx(100 * accuracy)
    assert found["base"]["macs"] == hne.count_macs(1)
    assert found["base"]["milliseconds"] > 0
    assert not any("Leaf 0 is" in note for note in found["notes"])
    shown = run(*arguments, "--base-weights", "base.pth", "--no-latency").stdout
    assert "Leaf 0 is the base model: it has the weights in base.pth." in shown
    assert shown.index("base model") < shown.index(f"{hne.count_macs(3):,}")
    unknown = reply(*arguments, "--no-latency")
    assert "accuracy" not in unknown["base"]
    assert any("--base-weights FILE" in note for note in unknown["notes"])


@pytest.mark.parametrize("content", ["missing", "text", "another model"])
def test_weights_of_another_model_are_refused(here: Path, content: str) -> None:
    if content == "text":
        Path("base.pth").write_text("no weights")
    elif content == "another model":
        torch.save(nn.Linear(2, 2).state_dict(), "base.pth")
    result = run("eval", "ensemble", "--data", "name=digits", "--base-weights", "base.pth")
    assert result.exit_code == 2
    assert "CheckpointError: base.pth" in result.stderr


def test_eval_says_when_leaves_agree_too_much_to_be_worth_their_cost(here: Path) -> None:
    net = Architecture("small:build", {"classes": 10})
    alike = treeify.hierarchicalize(net, ["stage1"], init="copy", example_input=small.EXAMPLE)
    treeify.save(alike, "alike")
    found = reply("eval", "alike", "--data", "name=digits", "--no-latency")
    assert [row["gain"] for row in found["scores"]] == [0, 0]
    cost = alike.count_macs() / alike.count_macs(1)
    assert f"2 leaves cost {cost:.2f} times the MACs of one for +0.00 points" in found["verdict"]
    assert "within the noise of 360 images" in found["verdict"]
    assert "two leaves name different classes for 0.0 %" in found["verdict"]
    assert found["verdict"] in run("eval", "alike", "--data", "name=digits", "--no-latency").stdout


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_tables_in_a_pipe_hold_whole_numbers(here: Path, columns: int) -> None:
    hne = treeify.load("ensemble")
    arguments = ("eval", "ensemble", "--data", "name=digits")
    shown = run(*arguments, columns=columns).stdout
    assert "…" not in shown
    assert all(f" {hne.count_macs(size):,} " in shown for size in (1, 3, 6))
    splits = run("splits", "small:build", "--input-size", "8", columns=columns).stdout
    assert "…" not in splits
    assert "│ stage1 " in splits
