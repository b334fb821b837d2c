"""Which files are meant by files, folders and patterns, and in which order."""

from pathlib import Path

import pytest

from treeify.cli.image_files import ImageFile, image_files
from treeify.errors import DataError, InputError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for file in ("b.png", "a.JPG", "c/d.webp", ".e/f.png", "._g.png", "notes.txt", "[h].png"):
        path = tmp_path / "photos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "photos").symlink_to(tmp_path / "photos")
    return tmp_path / "photos"


ALL = ["[h].png", "a.JPG", "b.png", "c/d.webp"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("photos", ALL),
        ("phot?s", ALL),
        ("photos/*.png", ["[h].png", "b.png"]),
        ("photos/**/*.webp", ["c/d.webp"]),
        ("photos/*.txt", ["notes.txt"]),
        ("photos/**", ["[h].png", "a.JPG", "b.png", "c/d.webp", "notes.txt"]),
    ],
)
def test_folders_and_patterns(photos: Path, word: str, expected: list[str]) -> None:
    files = image_files([word])
    assert sorted(file.path for file in files) == [Path("photos", name) for name in expected]
    assert not any(file.named for file in files)
    absolute = image_files([str(photos.parent / word)])
    assert [file.path for file in absolute] == [photos.parent / file.path for file in files]


def test_links_to_folders_are_followed(photos: Path) -> None:
    expected = [Path("linked", "photos", name) for name in ALL]
    assert [file.path for file in image_files(["linked"])] == expected


def test_links_that_lead_in_circles_count_no_image_twice(photos: Path) -> None:
    (photos / "c" / "back").symlink_to(photos)
    (photos / "again").symlink_to(photos / "c")
    (photos / "up").symlink_to(photos.parent)
    (photos.parent / "other.png").touch()
    assert len(image_files(["photos"])) == len(ALL)


def test_files_stay_in_the_order_they_were_named_in(photos: Path) -> None:
    words = ["photos/[h].png", "photos/b.png", "missing.png", "photos/notes.txt", "photos/c"]
    *named, found = image_files(words)
    assert named == [ImageFile(Path(word), named=True) for word in words[:-1]]
    assert found == ImageFile(Path("photos/c/d.webp"), named=False)


@pytest.mark.parametrize("word", ["http://a.org/b.png", "HTTPS://a//b.png", "file:///a.png"])
def test_addresses_are_refused_as_typed(word: str) -> None:
    with pytest.raises(InputError, match=f"^{word} is an address"):
        image_files(["a.png", word])


@pytest.mark.parametrize("word", ["photos/*.tif", "photos/.e/.x*", "empty"])
def test_what_holds_no_images_is_said(photos: Path, word: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        image_files([word])
