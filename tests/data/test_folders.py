"""Walking through folders with links: what is passed, in which order, and what is a circle."""

import os
from pathlib import Path

import pytest

from treeify.data.folders import require_no_circles, walk
from treeify.errors import DataError


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Two folders of images in `outer/top`, and one elsewhere."""
    for file in (
        "outer/top/b/2.png",
        "outer/top/b/10.png",
        "outer/top/a/.1.png",
        "elsewhere/3.png",
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "outer/top/.hidden").mkdir()
    return tmp_path / "outer" / "top"


def passed(top: Path) -> list[tuple[str, list[str]]]:
    return [(os.path.relpath(root, top), names) for root, names in walk(top)]


def test_folders_and_names_come_in_order_without_what_is_hidden(top: Path) -> None:
    assert passed(top) == [(".", []), ("a", []), ("b", ["10.png", "2.png"])]


def test_links_are_followed_once(top: Path) -> None:
    for name in ("c", "d"):
        (top / name).symlink_to(top.parents[1] / "elsewhere")
    assert passed(top)[-1] == ("c", ["3.png"])
    require_no_circles(top)


@pytest.mark.parametrize("target", ["outer/top/b", "outer/top", "outer", "."])
def test_a_link_to_a_folder_that_it_lies_in_is_a_circle(top: Path, target: str) -> None:
    before = passed(top)
    (top / "b" / "up").symlink_to(top.parents[1] / target)
    assert passed(top) == before
    with pytest.raises(DataError, match=r"up' is a link to a folder that it lies in(.|\n)*Remove"):
        require_no_circles(top)


def test_two_links_make_a_circle(top: Path) -> None:
    elsewhere = top.parents[1] / "elsewhere"
    (top / "b" / "there").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(top / "b")
    assert passed(top)[-1] == (str(Path("b", "there")), ["3.png"])
    with pytest.raises(DataError, match="back' is a link"):
        require_no_circles(top)


def test_the_folder_itself_may_be_a_link(top: Path) -> None:
    link = top.with_name("link")
    link.symlink_to(top)
    assert passed(link) == passed(top)
    require_no_circles(link)
