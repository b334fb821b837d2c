"""Quantities as the command line reads them."""

import pytest

from treeify.cli import quantities
from treeify.errors import InputError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20ms", 0.02), ("0.02s", 0.02), ("0.02", 0.02), (" 3 s ", 3), (".5", 0.5), ("15us", 1.5e-5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert quantities.seconds(text, "--deadline") == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("60M", 60_000_000),
        ("1.2G", 1_200_000_000),
        ("60000000", 60_000_000),
        ("60,000,000", 60_000_000),
        ("60_000_000", 60_000_000),
        ("150k", 150_000),
        ("6e7", 60_000_000),
        ("0.000001M", 1),
    ],
)
def test_counts(text: str, count: int) -> None:
    assert quantities.count(text, "--budget") == count


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("40", 40), ("40ms", 40), ("0.005s", 5), ("2.5 ms", 2.5), ("800us", 0.8)],
)
def test_milliseconds(text: str, milliseconds: float) -> None:
    assert quantities.milliseconds(text, "--max-ms") == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    ("text", "megabytes"), [("120", 120), ("120MB", 120), ("1.5GB", 1500), ("64 kB", 0.064)]
)
def test_megabytes(text: str, megabytes: float) -> None:
    assert quantities.megabytes(text, "--max-mb") == pytest.approx(megabytes)


@pytest.mark.parametrize(("text", "ends"), [("8", (8, 8)), ("4..32", (4, 32)), (" 4..4 ", (4, 4))])
def test_ranges(text: str, ends: tuple[int, int]) -> None:
    assert quantities.bounds(text, "--leaves") == ends


@pytest.mark.parametrize("text", ["", "..", "4..", "0..4", "8..4", "4-8", "4...8", "-4", "4..x"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(InputError, match=r"--leaves .* is no range"):
        quantities.bounds(text, "--leaves")


@pytest.mark.parametrize("text", ["", "0", "-1", "1 minute", "nan"])
def test_what_is_no_milliseconds_or_megabytes(text: str) -> None:
    with pytest.raises(InputError, match=r"--max-ms .* is no duration"):
        quantities.milliseconds(text, "--max-ms")
    with pytest.raises(InputError, match=r"--max-mb .* is no size of a file"):
        quantities.megabytes(text, "--max-mb")


def test_numbers_of_thousands_of_digits_are_none() -> None:
    many = "9" * 5000
    parsers = (quantities.seconds, quantities.count, quantities.numbers, quantities.size)
    parsers += (quantities.milliseconds, quantities.megabytes, quantities.bounds)
    for parse in (*parsers, quantities.part):
        for text in (many, f"{many}x8", f"1/{many}"):
            with pytest.raises(InputError, match="--option"):
                parse(text, "--option")
    with pytest.raises(InputError, match="--option"):
        quantities.count("1" + ",000" * 2000, "--option")


@pytest.mark.parametrize("text", ["", "ms", "20 minutes", "-1ms", "0", "0,020", "1e", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match=r"--deadline .* is no duration"):
        quantities.seconds(text, "--deadline")


@pytest.mark.parametrize("text", ["", "M", "0", "1.5", "-3M", "1,2G", "0,200", "60MB", "nan"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget .* is no whole number above 0"):
        quantities.count(text, "--budget")


def test_units_in_the_wrong_case_are_corrected() -> None:
    with pytest.raises(InputError, match="Did you mean 20ms"):
        quantities.seconds("20MS", "--deadline")
    with pytest.raises(InputError, match="Did you mean 20ms"):
        quantities.milliseconds("20MS", "--max-ms")
    with pytest.raises(InputError, match="Did you mean 20MB"):
        quantities.megabytes("20mb", "--max-mb")
    with pytest.raises(InputError, match=r"Did you mean 1\.2G"):
        quantities.count("1.2g", "--budget")


def test_numbers() -> None:
    assert quantities.numbers("0.5, -1,2e-1", "--mean") == (0.5, -1.0, 0.2)
    for text in ("", "a", "0.5,", "nan"):
        with pytest.raises(InputError, match=r"--mean .* is no list of numbers"):
            quantities.numbers(text, "--mean")
    with pytest.raises(InputError, match="above 0"):
        quantities.numbers("0.5,0", "--std", positive=True)


def test_parts() -> None:
    assert quantities.part("3/8", "--shard") == (3, 8)
    assert str(quantities.part("3/8", "--shard")) == "3/8"
    for text in ("", "3", "3/", "-1/8", "3/8/2", "a/b"):
        with pytest.raises(InputError, match=r"--shard .* is no shard"):
            quantities.part(text, "--shard")


@pytest.mark.parametrize(
    ("text", "size"), [("96", (96, 96)), ("96x160", (96, 160)), (" 8 ", (8, 8))]
)
def test_sizes_of_images(text: str, size: tuple[int, int]) -> None:
    assert quantities.size(text, "--input-size") == size


@pytest.mark.parametrize("text", ["", "0", "96x", "96x0", "96,160", "1x2x3", "-3", "2.5"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"--input-size .* is no size"):
        quantities.size(text, "--input-size")
