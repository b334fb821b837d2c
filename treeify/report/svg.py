"""Figures as SVG inside a page: text is text, colours are the page's, nothing is fetched."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from treeify.report import style
from treeify.report.chart import Chart

# In a page a colour is a variable, so that it can differ in the dark; its name in the style sheet.
VARIABLES = {
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.PAPER: "--paper",
    **{value: f"--series-{index}" for index, value in enumerate(style.SERIES)},
}
_COLOUR = re.compile("|".join(VARIABLES), re.IGNORECASE)
_REFERENCE = re.compile(r"#([\w-]+)")
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline_svg(chart: Chart, identifier: str) -> str:
    """A chart's figure as an element of a page.

    Args:
        chart: its figure is drawn, its title and description are read out.
        identifier: begins every name in the element: unique in the page.
    """
    root = ElementTree.fromstring(style.drawn(chart.figure, identifier, "svg"))
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    # Of the latter there is one in the first `defs`, which would hold for the whole page.
    for tag, places in (("metadata", [root]), ("style", root.findall("defs"))):
        for place in places:
            for unused in place.findall(tag):
                place.remove(unused)
    _rename(root, identifier)
    for element in root.iter():
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
        if element.attrib.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        for key, value in element.attrib.items():
            element.set(key, _compact(value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{identifier}-title {identifier}-desc")
    for position, (tag, text) in enumerate((("title", chart.title), ("desc", chart.description))):
        element = ElementTree.Element(tag, {"id": f"{identifier}-{tag}"})
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _compact(value: str) -> str:
    """An attribute in the page's colours and fonts, with numbers to a hundredth of a point."""
    value = _FAMILY.sub("", " ".join(value.split()))
    value = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value)
    return _COLOUR.sub(lambda match: f"var({VARIABLES[match[0].lower()]})", value)


def _local(name: str) -> str:
    """A name without its namespace: in a page, HTML knows what it means."""
    return name.rpartition("}")[2]


def _rename(root: ElementTree.Element, identifier: str) -> None:
    """Leave names only to what is referred to, and make those the page's own."""
    references = {
        name
        for element in root.iter()
        for key, value in element.attrib.items()
        if key == "href" or "url(" in value
        for name in _REFERENCE.findall(value)
    }
    names = {name: f"{identifier}-{index}" for index, name in enumerate(sorted(references))}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in names:
            element.set("id", names[own])
        for key, value in element.attrib.items():
            if key == "href" or "url(" in value:
                element.set(key, _REFERENCE.sub(lambda match: f"#{names[match[1]]}", value))
