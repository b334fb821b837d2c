"""Command lines of any words: an answer, or one message and exit code 2; no escape sequences."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import runs
import tiny_exports
from cli import saved_ensembles
from faults import ensembles
from faults.fuzzing import HOSTILE_WORDS, MANY, fuzzed, limited
from hypothesis import strategies as st
from runner import run

import treeify
from treeify.cli.app import COMMANDS
from treeify.data import Preparation
from treeify.errors import ExportError, printable

# What there is in the folder where the commands run; a run of this recipe finds no images.
FILES = [
    "ensemble",
    "export",
    "a.png",
    "pipe",
    "link",
    "damaged",
    "photos",
    "recipe.yaml",
    "grid.yaml",
]
NAMES = ["resnet", "torchvision/", "timm/x", "nowhere:x", "os:sep", "small:CLASSES", ":", "a:b:c"]
SIZES = ["3x3", "0x0", "1e3", "20ms", "-5", "1/2", "3/0", "0.5,0.5", "0.5,x", "60M", "cuda:99"]
OPTIONS = [
    *("--splits", "--fanout", "--num-classes", "--input-size", "--weights", "--out", "--overwrite"),
    *("--json", "--csv", "--labels", "--top", "--batch-size", "--deadline", "--confidence"),
    *("--budget", "--leaves", "--mean", "--std", "--device", "--data", "--resume", "--epochs"),
    *("--model", "--more-epochs", "--shard", "--output", "--family", "--seeds", "--only", "--help"),
    *("--sizes", "--batch", "--int8", "--calibrate", "--no-tune", "--no-verify", "--trust"),
    *("--no-such", "-x", "--", "-", "optimizer.lr=1e-3", "data.root=photos", "model.splits=[a]"),
]
COMMAND_WORDS = [word for word in HOSTILE_WORDS if "\x00" not in word]  # which no system passes on
arguments = st.lists(
    st.one_of(
        st.sampled_from(OPTIONS),
        st.sampled_from([*FILES, *NAMES, *SIZES]),
        st.sampled_from(COMMAND_WORDS),
        st.text(st.characters(exclude_characters="\x00"), max_size=12),
    ),
    max_size=5,
)
# Fewer of what works and takes a second.
commands = st.sampled_from([*COMMANDS, "splits", "predict", "predict", "train", "eval", "pack"])
lines = st.one_of(
    st.tuples(commands, arguments).map(lambda pair: [pair[0], *pair[1]]),
    st.tuples(
        st.sampled_from(["predict", "eval", "calibrate", "export"]),
        st.sampled_from(["ensemble", "export"]),
        arguments,
    ).map(lambda words: [*words[:2], *words[2]]),
    arguments,
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory for a while, two levels below what no command may touch."""
    path = tmp_path_factory.mktemp("lines") / "user" / "here"
    path.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(path)
    hne = ensembles.buildable()
    hne.preparation = Preparation(size=(8, 8), mean=(0.5,), std=(0.5,))
    treeify.save(hne, "ensemble")
    tiny_exports.write(path / "export")
    runs.photos(path / "photos", each=1)
    saved_ensembles.write_digits(path, 1)
    Path("0.png").rename("a.png")
    os.mkfifo("pipe")
    Path("link").symlink_to("link")
    Path("damaged").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x1b[31m")
    recipe = runs.RECIPE.replace("{name: digits, held_out: 1497}", "{name: image_folder, root: a}")
    Path("recipe.yaml").write_text(recipe)
    Path("grid.yaml").write_text("{name: g, recipe: recipe.yaml, variants: {a: [seed=x]}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treeify.cli.export.write", too_slow)
        yield path
    os.chdir(before)


def too_slow(*arguments: object, **options: object) -> None:
    """In the place of an export, which takes longer than a line may."""
    raise ExportError("nothing is exported here.", next_step="Export it elsewhere.")


def check(line: Sequence[str]) -> None:
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(*line)
    assert "This is a bug" not in result.output, result.output
    assert result.exit_code in (0, 2), result.output
    assert printable(result.output, in_file=True) == result.output


@fuzzed(60, line=lines)
def test_a_command_line_of_any_words(here: Path, line: list[str]) -> None:
    check(line)


@fuzzed(MANY, line=lines)
def test_ten_thousand_command_lines(here: Path, line: list[str]) -> None:
    check(line)
