"""The page: one file, small, without scripts or requests, whatever names it is told."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from treeify.report.api import Report
from treeify.report.results import Conversion

HOSTILE = (
    "<script>alert(1)</script>&\"'$x_1$ {{ 7 * 7 }} ]]> --> </title></svg>\x00\x1b[31m\u202e\udcff"
)


class Elements(HTMLParser):
    """Every element with its attributes, and the text of those that are left open."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_alone(page: str) -> Elements:
    """Nothing runs, nothing is fetched, every element is closed, and every name is there once."""
    found = Elements(page)
    assert not found.open
    assert not {tag for tag, _ in found.all} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
    }
    names = [attributes["id"] for _, attributes in found.all if attributes.get("id")]
    assert len(names) == len(set(names))
    for tag, attributes in found.all:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "srcset", "action", "poster"):
                assert value is not None
                assert value.startswith(
                    ("#", "data:image/png;base64,", "data:image/jpeg;base64,")
                ), (tag, key, value)
                if value.startswith("#"):
                    assert value[1:] in names
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#")
        assert target[1:] in names
    assert "@import" not in page
    return found


def test_a_page_of_one_run_is_small_and_stands_alone(html: str) -> None:
    assert len(html.encode()) < 1_000_000
    found = check_alone(html)
    assert html.lstrip().startswith("<!doctype html>")
    tags = [tag for tag, _ in found.all]
    assert tags.count("svg") == tags.count("figure") == 21
    assert tags.count("figcaption") == 21


def test_every_figure_has_title_description_and_a_table(html: str, report: Report) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", html, re.DOTALL)
    for figure, chart in zip(figures, report.charts, strict=True):
        (svg,) = re.findall(r"<svg .*?</svg>", figure, re.DOTALL)
        assert 'role="img"' in svg
        name = chart.name
        assert f'aria-labelledby="{name}-title {name}-desc"' in svg
        assert f'<title id="{name}-title">' in svg
        assert f'<desc id="{name}-desc">' in svg
        rows = re.findall(r"<tr>.*?</tr>", figure, re.DOTALL)
        assert len(rows) == 1 + len(chart.table.rows)
        cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]
        assert [len(row) for row in cells] == [len(row) for row in chart.table.rows]
        assert cells[0][-1] == chart.table.cells[0][-1]


def test_text_stays_text_in_the_colours_of_the_page(html: str) -> None:
    (svg,) = re.findall(r'<svg [^>]*aria-labelledby="trade_off-title.*?</svg>', html, re.DOTALL)
    assert ">accuracy, %</text>" in svg
    assert "var(--ink)" in svg
    assert "var(--series-0)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_names_are_text_whatever_they_say(report: Report) -> None:
    (result,) = report.contents.results
    answers = result.answers
    assert answers is not None
    classes = tuple(f"{HOSTILE}{index}" for index in range(10))
    thumbnails = tuple(
        replace(each, target=HOSTILE, before=HOSTILE, after=HOSTILE) for each in answers.thumbnails
    )
    hostile = replace(
        result,
        name=HOSTILE,
        answers=replace(answers, classes=classes, thumbnails=thumbnails, split=HOSTILE),
        origin={HOSTILE: HOSTILE},
        recipe=HOSTILE,
        missing={"parity": HOSTILE, "environment": HOSTILE},
        parity=None,
    )
    contents = replace(report.contents, results=(hostile,))
    html = Report(contents).html(HOSTILE)
    check_alone(html)
    assert not re.search("[\x00\x1b\u202e\udcff]", html)
    assert html.encode()
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html


def test_several_results_of_one_name_do_not_share_names(report: Report) -> None:
    (result,) = report.contents.results
    named = tuple(replace(result, name=name) for name in ("a b", "a/b"))
    contents = replace(report.contents, results=named)
    check_alone(Report(contents).html())


@pytest.mark.parametrize("name", ["多数の葉", "ع", "x" * 300])
def test_long_names_and_other_scripts_are_drawn(report: Report, name: str) -> None:
    (result,) = report.contents.results
    contents = replace(report.contents, results=(replace(result, name=name),))
    html = Report(contents).html()
    check_alone(html)
    assert name in html


def test_what_runs_branch_by_branch_is_listed_with_its_reason(report: Report) -> None:
    (result,) = report.contents.results
    fallbacks = {"sort: no rule for <sort>": 3, "roll: shifts differ": 1}
    conversion = Conversion(0.5, fallbacks, ("keeps <all> activations",))
    contents = replace(report.contents, results=(replace(result, conversion=conversion),))
    html = Report(contents).html()
    check_alone(html)
    assert "50.0% of the branches&#39; MACs" in html
    assert re.search(r"<td>sort: no rule for &lt;sort&gt;</td><td[^>]*>3</td>", html)
    assert "keeps &lt;all&gt; activations" in html
    assert "every operation has a rule" not in html
