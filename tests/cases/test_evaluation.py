"""What people give an ensemble, ask of it, and compare it with (answers, scores, tables)."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from cli import saved_ensembles as saved
from PIL import Image
from rich.console import Console
from runner import run
from torch import Tensor, nn

import treeify
from treeify.cli import calibrate
from treeify.cli.output import say
from treeify.data import Preparation, digits
from treeify.engine.plan import Situation, Tuning
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
    saved.save(tmp_path / "ensemble", Preparation(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3))
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
    hne = treeify.load("ensemble", trust=True)
    data = ("--data", "name=image_folder", "--data", "root=photos", "--no-latency")
    found = reply("eval", "ensemble", "--trust", *data)
    assert [row["macs"] for row in found["scores"]] == [hne.count_macs(n) for n in (1, 3, 6)]
    assert not any("converted for" in note for note in found["notes"])
    larger = reply("eval", "ensemble", "--trust", *data, "--data", "size=16")
    assert larger["scores"][0]["macs"] > 3 * hne.count_macs(1)
    assert "Images of 3 x 16 x 16; the ensemble was converted for 3 x 8 x 8." in larger["notes"]


def test_thresholds_are_chosen_at_the_size_the_ensemble_was_converted_for(here: Path) -> None:
    folders(here / "photos")
    target = treeify.load("ensemble", trust=True).count_macs(3)
    data = ("--data", "name=image_folder", "--data", "root=photos")
    reply(
        "calibrate", "ensemble", "--trust", "--target-macs", f"{target}", "--no-tune", *QUICK, *data
    )
    assert list(treeify.load("ensemble", trust=True).budgets) == [target]


def test_eval_puts_the_base_model_first(here: Path) -> None:
    hne = treeify.load("ensemble", trust=True)
    assert hne.preparation is not None
    examples = [*digits(crop_padding=1).prepared_by(hne.preparation).held_out]
    x, labels = torch.stack([image for image, _ in examples]), [label for _, label in examples]
    torch.save(hne.leaf(0).state_dict(), "base.pth")
    torch.save(hne.leaf(4).state_dict(), "other.pth")
    arguments = ("eval", "ensemble", "--trust", "--data", "name=digits")
    found = reply(*arguments, "--weights", "other.pth")
    right = hne.leaf(4).eval()(x).argmax(1) == torch.tensor(labels)
    accuracy = right.double().mean().item()
    assert found["base"]["accuracy"] == pytest.approx(100 * accuracy)
    assert found["base"]["macs"] == hne.count_macs(1)
    assert found["base"]["milliseconds"] > 0
    assert not any("Leaf 0 is" in note for note in found["notes"])
    shown = run(*arguments, "--weights", "base.pth", "--no-latency").stdout
    assert "Leaf 0 is the base model: it has the weights in base.pth." in shown
    assert shown.index("base model") < shown.index(f"{hne.count_macs(3):,}")
    unknown = reply(*arguments, "--no-latency")
    assert "accuracy" not in unknown["base"]
    assert any("--weights PATH" in note for note in unknown["notes"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("missing", "there is no file of weights 'base.pth'"),
        ("text", "base.pth"),
        ("another model", "the weights of base.pth do not fit"),
    ],
)
def test_weights_of_another_model_are_refused(here: Path, content: str, reason: str) -> None:
    if content == "text":
        Path("base.pth").write_text("no weights")
    elif content == "another model":
        torch.save(nn.Linear(2, 2).state_dict(), "base.pth")
    result = run("eval", "ensemble", "--trust", "--data", "name=digits", "--weights", "base.pth")
    assert result.exit_code == 2
    assert result.stderr.startswith("CheckpointError: ") and reason in result.stderr


def test_eval_says_when_leaves_agree_too_much_to_be_worth_their_cost(here: Path) -> None:
    net = Architecture("small:build", {"classes": 10})
    alike = treeify.hierarchicalize(net, ["stage1"], init="copy", example_input=small.EXAMPLE)
    treeify.save(alike, "alike")
    found = reply("eval", "alike", "--trust", "--data", "name=digits", "--no-latency")
    assert [row["gain"] for row in found["scores"]] == [0, 0]
    cost = alike.count_macs() / alike.count_macs(1)
    assert f"2 leaves cost {cost:.2f} times the MACs of one for +0.00 points" in found["verdict"]
    assert "within the noise of 360 images" in found["verdict"]
    assert "two leaves name different classes for 0.0 %" in found["verdict"]
    assert (
        found["verdict"]
        in run("eval", "alike", "--trust", "--data", "name=digits", "--no-latency").stdout
    )


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_tables_in_a_pipe_hold_whole_numbers(here: Path, columns: int) -> None:
    hne = treeify.load("ensemble", trust=True)
    arguments = ("eval", "ensemble", "--trust", "--data", "name=digits")
    shown = run(*arguments, columns=columns).stdout
    assert "…" not in shown
    assert all(f" {hne.count_macs(size):,} " in shown for size in (1, 3, 6))
    splits = run("splits", "small:build", "--input-size", "8", columns=columns).stdout
    assert "…" not in splits
    assert "│ stage1 " in splits


def test_calibrate_finds_the_best_answer_within_milliseconds_or_for_an_accuracy(
    here: Path,
) -> None:
    hne = treeify.load("ensemble", trust=True)
    data = ("--data", "name=digits", "--no-tune", *QUICK)
    found = reply(
        "calibrate", "ensemble", "--trust", *data, "--target-ms", "1000", "--target-accuracy", "1"
    )
    by_accuracy, by_time = found["targets"]
    assert by_accuracy["option"] == "--target-accuracy"
    assert by_accuracy["macs"] == hne.count_macs(1)  # even one leaf is right so often
    assert (by_accuracy["leaves"], by_accuracy["budget"]) == (1, None)
    assert by_time["milliseconds"] < 1000
    best = max(row["accuracy"] for row in found["fixed"])
    assert by_time["accuracy"] > best - 0.1
    kept = treeify.load("ensemble", trust=True).budgets
    assert set(kept) == {by_time["budget"]} - {None}


def test_a_sweep_shows_what_every_budget_costs_and_predict_keeps_to_it(here: Path) -> None:
    shown = run(
        "calibrate", "ensemble", "--trust", "--data", "name=digits", "--no-tune", *QUICK, "--sweep"
    )
    assert shown.exit_code == 0, shown.output
    kept = treeify.load("ensemble", trust=True).budgets
    assert len(kept) >= 8
    for target, budget in kept.items():
        assert f"budget {target:,} " in shown.stdout
        assert f" {100 * budget.accuracy:.2f} " in shown.stdout
    files, _ = saved.write_digits(here / "digits", 1)
    assert reply("predict", "ensemble", "--trust", *files, "--budget", f"{min(kept)}")[
        "budget"
    ] == min(kept)


def test_a_plan_that_is_starred_though_slower_is_explained() -> None:
    hne, x = small.ensemble(), small.images()
    plan = hne.plan(x)
    other = replace(plan, fuse=True)
    situation = Situation.of(x, training=False)
    slower = Tuning(situation, plan, {str(plan): 1.01, str(other): 1.0})
    fastest = Tuning(situation, other, slower.seconds)
    assert "gives way only to one that wins by 2 %" in str(slower)
    assert "gives way" not in str(fastest)
    file = io.StringIO()
    say(Console(file=file), calibrate._tuning_table(slower), calibrate._tuning_table(fastest))
    assert file.getvalue().count("gives way") == 1


def test_a_deadlines_answer_says_how_many_leaves_and_whether_it_was_met() -> None:
    hne, x = small.ensemble(), small.images(3)
    hne.calibrate(x, repeats=2)
    answer = hne.predict(x, deadline=60.0)
    assert answer.met
    assert 0 < answer.seconds < 60
    assert answer.leaves.tolist() == [6] * 3
    torch.testing.assert_close(answer.logits, hne.predict(x).detach())
    late = hne.predict(x, deadline=1e-9)
    assert late.met is False
    assert late.leaves.tolist() == [1] * 3
    sure = hne.predict(x, confidence=0.0)
    assert (sure.met, sure.leaves.tolist()) == (None, [1] * 3)
    assert type(sure) is type(answer)


def tree_of_images(root: Path) -> list[str]:
    """Five digits in folders, among what is not meant: the files that are, in their order."""
    files, _ = saved.write_digits(root, 5)
    (root / "more").mkdir()
    (root / ".cache").mkdir()
    Path(files[3]).rename(root / "more" / "3.PNG")
    Path(files[4]).rename(root / ".cache" / "4.png")
    (root / "notes.txt").write_text("no image")
    (root / "._0.png").write_text("no image")
    return [*files[:3], str(root / "more" / "3.PNG")]


def test_predict_takes_a_folder_or_a_pattern(here: Path) -> None:
    files = tree_of_images(Path("photos"))
    for word in ("photos", "phot?s"):
        found = reply("predict", "ensemble", "--trust", word)
        assert [image["path"] for image in found["images"]] == files


def test_a_folder_is_answered_batch_by_batch_as_all_at_once(here: Path) -> None:
    files = tree_of_images(Path("photos"))
    whole = reply("predict", "ensemble", "--trust", "photos")
    parts = reply("predict", "ensemble", "--trust", "photos", "--batch-size", "3")
    assert (whole["batches"], parts["batches"]) == (1, 2)
    for one, other in zip(whole["images"], parts["images"], strict=True):
        assert one["path"] == other["path"]
        assert one["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"], 1e-4)
    timed = run("predict", "ensemble", "--trust", *files, "--batch-size", "3", "--deadline", "60s")
    assert "Deadline of 60000 ms met by 2 of 2 batches: the slowest answered after" in timed.stdout


def test_predict_writes_a_table_of_a_line_per_image(here: Path) -> None:
    files = tree_of_images(Path("photos"))
    Path("names.txt").write_text("\n".join(f"digit, {name}" for name in range(10)))
    result = run(
        "predict", "ensemble", "--trust", "photos", "--csv", "a.csv", "--labels", "names.txt"
    )
    assert result.exit_code == 0, result.output
    assert "Written to a.csv: 4 images." in result.stdout
    assert "probability" not in result.stdout
    images = reply("predict", "ensemble", "--trust", "photos", "--labels", "names.txt")["images"]
    with Path("a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == files
    for line, image in zip(lines, images, strict=True):
        best = image["top"][0]
        assert (int(line["class"]), line["label"]) == (best["class"], best["label"])
        assert float(line["probability"]) == pytest.approx(best["probability"], rel=1e-5)
        assert int(line["leaves"]) == 6


def test_damaged_files_of_a_folder_are_named_and_left_out(here: Path) -> None:
    files = tree_of_images(Path("photos"))
    Path(files[1]).write_bytes(b"no image")
    found = reply("predict", "ensemble", "--trust", "photos", "--batch-size", "2")
    assert found["unread"] == [files[1]]
    assert [image["path"] for image in found["images"]] == [files[0], *files[2:]]
    assert (
        f"Not read, and left out: {files[1]}."
        in run("predict", "ensemble", "--trust", "photos").stdout
    )
    named = run("predict", "ensemble", "--trust", *files, "--csv", "a.csv")
    assert named.exit_code == 2
    assert files[1] in named.stderr
    assert not Path("a.csv").exists()
    for file in files:
        Path(file).write_bytes(b"no image")
    none = run("predict", "ensemble", "--trust", "photos", "--csv", "a.csv")
    assert none.exit_code == 2
    assert "none of the 4 images can be read" in none.stderr


UNFIT_WORDS = {
    "address": (
        "https://example.org/a//b.png?x=1",
        "org/a//b.png?x=1 is an address",
    ),
    "bucket": ("s3://bucket/a.png", "Download it first."),
    "empty folder": ("empty", "'empty' holds no images."),
    "pattern": ("*.jpg", "'*.jpg' holds no images."),
    "missing": ("missing.png", "'missing.png'"),
}


@pytest.mark.parametrize(("word", "part"), UNFIT_WORDS.values(), ids=UNFIT_WORDS)
def test_what_names_no_image_is_said_as_typed(here: Path, word: str, part: str) -> None:
    Path("empty").mkdir()
    result = run("predict", "ensemble", "--trust", word)
    assert result.exit_code == 2
    assert part in result.stderr


@pytest.mark.parametrize("file", ["nowhere/a.csv", "ensemble"])
def test_a_table_that_cannot_be_written_is_said_first(here: Path, file: str) -> None:
    for command in (("predict", "ensemble", "--trust", "a.png"), ("eval", "ensemble", "--trust")):
        result = run(*command, "--csv", file)
        assert result.exit_code == 2
        assert f"DataError: --csv {file} cannot be written." in result.stderr
