"""Options with units: what reaches a command, and what a user sees of a wrong one."""

from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from treeify.cli.options import count, duration, numbers, part
from treeify.cli.quantities import Part
from treeify.errors import InputError

values: dict[str, Any] = {}
app = typer.Typer()


@app.command()
def command(
    wait: Annotated[float | None, duration("--wait", "A time.")] = None,
    most: Annotated[list[int] | None, count("--most", "Numbers.")] = None,
    memory: Annotated[int, count("--memory", "Bytes.", "BYTES")] = "8G",  # type: ignore[assignment]
    mean: Annotated[Any, numbers("--mean", "Numbers.")] = None,
    std: Annotated[Any, numbers("--std", "Numbers.", positive=True)] = None,
    shard: Annotated[Part | None, part("--shard", "A part.")] = None,
) -> None:
    values.update(wait=wait, most=most, memory=memory, mean=mean, std=std, shard=shard)


def test_options_are_values_and_defaults_are_parsed_too() -> None:
    assert CliRunner().invoke(app, []).exit_code == 0
    assert values["memory"] == 8 * 10**9
    assert values["wait"] is values["mean"] is values["shard"] is None
    words = ["--wait", "20ms", "--most", "1k", "--most", "2M", "--memory", "1G", "--shard", "2/3"]
    result = CliRunner().invoke(app, [*words, "--mean", "0,1", "--std", "2"])
    assert result.exit_code == 0, result.output
    assert values == {
        "wait": 0.02,
        "most": [1_000, 2_000_000],
        "memory": 10**9,
        "mean": (0.0, 1.0),
        "std": (2.0,),
        "shard": (2, 3),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wait", "long"], "--wait 'long' is no duration"),
        (["--most", "1", "--most", "many"], "--most 'many' is no whole number"),
        (["--mean", "x"], "--mean 'x' is no list of numbers"),
        (["--std", "0"], "--std '0' is no list of numbers above 0"),
        (["--shard", "2"], "--shard '2' is no shard"),
    ],
)
def test_errors_name_the_option(words: list[str], message: str) -> None:
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, InputError)
    assert message in str(error)


def test_the_help_names_units() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for word in ("TIME", "COUNT", "BYTES", "NUMBERS", "K/N", "8G"):
        assert word in text
