"""Command lines of any words: an answer, or one message and exit code 2; no escape sequences."""

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import runs
import small
import tiny_exports
import torch
from cli import saved_ensembles
from faults import ensembles
from faults.fuzzing import HOSTILE_WORDS, MANY, fuzzed, limited
from hypothesis import strategies as st
from runner import run

import treeify
from treeify import files
from treeify.cli.app import COMMANDS, load_command
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


# Each command as it may be right, and what an option's value may be.
RIGHT = {
    "splits": ["small:build"],
    "plan": ["small:build", "--input-size", "8", "--leaves", "4"],
    "convert": ["small:build", "--input-size", "8", "--no-verify"],
    "pack": ["small:build", "a.pth", "b.pth", "--splits", "input", "--no-verify"],
    "train": ["recipe.yaml"],
    "eval": ["ensemble", "--data", "name=image_folder", "--data", "root=photos", "--no-latency"],
    "ablate": ["grid.yaml", "--show"],
    "predict": ["ensemble", "a.png"],
    "calibrate": ["ensemble", "--no-tune", "--repeats", "10"],
    "verify": ["test_resnet", "--shard", "2/2"],
    "list": ["test_resnet"],
    "report": ["ensemble", "--no-latency", "--no-verify", "--out", "page.html"],
    "push": ["ensemble", "a/b", "--dry-run"],
    "recipes": ["digits_hne"],
    "benchmark": ["ensemble", "--repeats", "3"],
}
# They take as long as one says.
ENDLESS = {"--epochs", "--more-epochs", "--all", "--repeats", "--retry", "--tune"}
# Or seconds, since they measure.
ENDLESS |= {"--measure", "--max-ms", "--first-ms"}
VALUES = [
    *("0", "1", "2", "3", "7", "64", "-1", "1000", str(2**31), str(2**63), str(10**30)),
    *("0.5", "1e-3", "1e308", "1e-400", "99.9", "60k", "1.2G", "20us", "1e9s", "8", "8x8", "1e9x8"),
    *("size=8", "size=1e9", "split_seed=x", "held_out=0.5", "root=", "=", "name=digits"),
    *("input", "input:3", "stage1:2,stage2", "stage2,stage1", "stage1:65537", "copy", "perturb"),
    *("classes.txt", "a.pth", "new", "new/below", "photos/train", "cpu", "mps", "dark", "*"),
]


@cache
def options_of(command: str) -> list[tuple[str, bool]]:
    """The options of a command, and whether a value follows."""
    names = [
        (name, not parameter.is_flag)
        for parameter in load_command(command).params
        if hasattr(parameter, "is_flag")
        for name in [*parameter.opts, *parameter.secondary_opts]
    ]
    return sorted(option for option in names if option[0] not in ENDLESS)


@st.composite
def nearly_right(draw: st.DrawFn) -> list[str]:
    """A command line that would be right but for an option or three, of those the command has."""
    command = draw(st.sampled_from(sorted(RIGHT)))
    line = [command, *RIGHT[command]]
    for _ in range(draw(st.integers(1, 3))):
        name, has_value = draw(st.sampled_from(options_of(command)))
        value = st.sampled_from([*VALUES, *FILES, *NAMES, *SIZES]) | st.sampled_from(COMMAND_WORDS)
        line += [name, draw(value)] if has_value else [name]
    return line


def _fill(path: Path) -> None:
    """Put what commands find into a folder."""
    hne = ensembles.buildable()
    hne.preparation = Preparation(size=(8, 8), mean=(0.5,), std=(0.5,))
    treeify.save(hne, path / "ensemble")
    tiny_exports.write(path / "export")
    runs.photos(path / "photos", each=1)
    saved_ensembles.write_digits(path, 1)
    (path / "0.png").rename(path / "a.png")
    for seed, name in enumerate(("a.pth", "b.pth")):
        torch.manual_seed(seed)
        torch.save(small.build().state_dict(), path / name)
    (path / "classes.txt").write_text("\n".join("0123456789"))
    (path / "link").symlink_to("link")
    (path / "damaged").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x1b[31m")
    recipe = runs.RECIPE.replace("{name: digits, held_out: 1497}", "{name: image_folder, root: a}")
    (path / "recipe.yaml").write_text(recipe)
    (path / "grid.yaml").write_text("{name: g, recipe: recipe.yaml, variants: {a: [seed=x]}}")


def _state(path: Path) -> list[tuple[str, int, int]]:
    """What tells whether anything in a folder was written."""
    entries = ((entry, entry.lstat()) for entry in sorted(path.rglob("*")))
    return [(str(entry), stat.st_size, stat.st_mtime_ns) for entry, stat in entries]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory for a while, two levels below what no command may touch."""
    path = tmp_path_factory.mktemp("lines") / "user" / "here"
    path.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(path)
    _fill(path.with_name("as it was"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treeify.cli.export.write", too_slow)
        yield path
    os.chdir(before)


def too_slow(*arguments: object, **options: object) -> None:
    """In the place of an export, which takes longer than a line may."""
    raise ExportError("nothing is exported here.", next_step="Export it elsewhere.")


_seen: dict[Path, list[tuple[str, int, int]]] = {}


def _restore(here: Path) -> None:
    """Undo what the line before has written."""
    if here in _seen and _state(here) == _seen[here]:
        return
    for entry in here.iterdir():
        files.remove(entry)
    shutil.copytree(here.with_name("as it was"), here, symlinks=True, dirs_exist_ok=True)
    os.mkfifo(here / "pipe")
    _seen[here] = _state(here)


def check(here: Path, line: Sequence[str]) -> None:
    _restore(here)
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(*line)
    assert "This is a bug" not in result.output, result.output
    if result.exit_code != 1 or "of 1 failed: test_resnet" not in result.output:  # verify's verdict
        assert result.exit_code in (0, 2), result.output
    assert printable(result.output, in_file=True) == result.output


@fuzzed(60, line=lines)
def test_a_command_line_of_any_words(here: Path, line: list[str]) -> None:
    check(here, line)


@fuzzed(MANY, line=lines)
def test_ten_thousand_command_lines(here: Path, line: list[str]) -> None:
    check(here, line)


@fuzzed(60, line=nearly_right())
def test_a_command_line_with_an_option_too_many(here: Path, line: list[str]) -> None:
    check(here, line)


@fuzzed(MANY, line=nearly_right())
def test_ten_thousand_options(here: Path, line: list[str]) -> None:
    check(here, line)
