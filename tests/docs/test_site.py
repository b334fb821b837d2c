"""The site builds without a warning, has every page and public name, and fetches nothing."""

import re
import subprocess
import sys
import zlib
from collections import defaultdict
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import treeify
from treeify import errors, losses
from treeify.cli.app import COMMANDS, app, load_command

pytestmark = pytest.mark.thorough

DOCS = Path(__file__).parents[2] / "docs"
ROOMS = ("data", "deploy", "models", "report")  # beside treeify.__all__


class Page(HTMLParser):
    """What a browser fetches to show a page, and where the page's links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        fetched = [values.get(name, "") for name in ("src", "data", "poster", "action")]
        fetched += [part.split()[0] for part in values.get("srcset", "").split(",") if part]
        if tag in ("link", "use", "image"):
            fetched += [values.get("href", ""), values.get("xlink:href", "")]
        elif tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.fetched += filter(None, fetched)
        self.ids |= {values[name] for name in ("id", "name") if name in values}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(out / "doctrees"), str(DOCS), str(out / "html")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


@pytest.fixture(scope="module")
def entries(site: Path) -> dict[str, set[str]]:
    """The names that have an entry, by kind."""
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)  # after four lines of words
    kinds: dict[str, set[str]] = defaultdict(set)
    for line in zlib.decompress(packed).decode().splitlines():
        name, kind = re.match(r"(.+?) (\S+:\S+) -?\d+ ", line).groups()  # type: ignore[union-attr]
        kinds[kind].add(name)
    return kinds


def is_foreign(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def test_every_page_is_on_the_site_and_in_its_contents(pages: dict[Path, Page], site: Path) -> None:
    written = {path.relative_to(DOCS) for path in DOCS.rglob("*.md")}
    contents = (site / "index.html").read_text("utf-8")
    for page in written:
        target = page.with_suffix(".html")
        assert site / target in pages
        assert page.name == "index.md" or f'href="{target}"' in contents, page


def test_every_public_name_has_an_entry(entries: dict[str, set[str]]) -> None:
    names = {f"treeify.{name}" for name in treeify.__all__}
    for room in ROOMS:
        names |= {f"treeify.{room}.{name}" for name in import_module(f"treeify.{room}").__all__}
    names |= {f"treeify.losses.{name}" for name in losses.names()}
    names |= {
        f"treeify.errors.{name}"
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    } - {"treeify.errors.TreeifyError"}
    documented = set().union(*(found for kind, found in entries.items() if kind[:3] == "py:"))
    assert names <= documented, names - documented
    ensemble = {
        f"treeify.HierarchicalEnsemble.{name}"
        for name in ("predict", "anytime", "session", "calibrate", "tune", "leaf", "tree")
    }
    assert ensemble <= documented, ensemble - documented


def test_every_option_has_an_entry(entries: dict[str, set[str]]) -> None:
    commands = {"treeify": typer.main.get_command(app)}
    commands |= {f"treeify {name}": load_command(name) for name in COMMANDS}
    for name, command in commands.items():
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                entry = f"{name.replace(' ', '-')}.{option}"
                assert entry in entries["std:cmdoption"], entry


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    for path, page in pages.items():
        assert page.fetched
        foreign = [address for address in page.fetched if is_foreign(address)]
        assert not foreign, (path, foreign)
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert styles
    addresses = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]+)", "\n".join(styles))
    assert not [address for address in addresses if is_foreign(address)]
    for path in site.rglob("*.js"):  # fetch("https://..."), import ... from "https://..."
        called = re.findall(
            r"(?:fetch|import|from|open)\s*\(?\s*['\"](//|https?:)", path.read_text()
        )
        assert not called, path


def test_links_within_the_site_lead_somewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} -> {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name} -> {link}"


def test_a_foreign_address_would_be_noticed() -> None:
    page = Page(
        '<link href="https://fonts.example/a.css"><script src="//cdn.example/b.js"></script>'
        '<img srcset="c.png 1x, https://d.example/c.png 2x"><a href="https://paper.example">P</a>'
    )
    foreign = [address for address in page.fetched if is_foreign(address)]
    assert len(foreign) == 3
    assert page.links == ["https://paper.example"]
