"""Files that are there whole or as they were, whatever happens; checked in the order it happens."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treeify import files
from treeify.errors import CheckpointError


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was brought to the disk, by inode, and what got a name, in order."""
    found: list[tuple[str, str]] = []
    fsync = os.fsync

    def bring(descriptor: int) -> None:
        found.append(("fsync", str(os.stat(descriptor).st_ino)))
        fsync(descriptor)

    def renamed(original):
        def rename(self: Path, target: Path) -> Path:
            found.append(("rename", Path(target).name))
            return original(self, target)

        return rename

    monkeypatch.setattr(os, "fsync", bring)
    monkeypatch.setattr(Path, "rename", renamed(Path.rename))
    monkeypatch.setattr(Path, "replace", renamed(Path.replace))
    return found


def inode(path: Path) -> str:
    return str(path.stat().st_ino)


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    files.replace_text(path, "new\n")
    assert path.read_text() == "new\n"
    assert events == [("fsync", inode(path)), ("rename", "file"), ("fsync", inode(tmp_path))]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_and_all_in_it_are_on_the_disk_before_it_has_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    final = tmp_path / "state"

    def write(draft: Path) -> None:
        assert not final.exists()
        (draft / "inner").mkdir()
        for file in (draft / "one", draft / "inner" / "two"):
            file.write_text(file.name)

    files.publish(final, write)
    inside = [final / "one", final / "inner", final / "inner" / "two"]
    at = events.index(("rename", "state"))
    assert {("fsync", inode(path)) for path in (*inside, final)} == set(events[:at])
    assert events[at + 1 :] == [("fsync", inode(tmp_path))]
    assert [path.read_text() for path in inside if path.is_file()] == ["one", "two"]


def test_a_directory_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    files.publish(tmp_path / "state", lambda draft: pytest.fail("it was written again"))
    assert not list((tmp_path / "state").iterdir())


def test_a_directory_that_could_not_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        (draft / "half").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        files.publish(tmp_path / "state", write)
    assert not list(tmp_path.iterdir())


def test_a_line_is_on_the_disk_and_stands_alone(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    path = tmp_path / "lines"
    files.append_line(path, "first")
    assert events == [("fsync", inode(path))]
    path.write_bytes(path.read_bytes() + b"cut o")
    files.append_line(path, "second")
    files.append_line(path, "third")
    assert path.read_text().splitlines() == ["first", "cut o", "second", "third"]


def test_a_link_names_something_at_every_moment(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    for name in ("one", "two"):
        (tmp_path / "states" / name).mkdir(parents=True)
        files.point(tmp_path / "last", tmp_path / "states" / name)
        assert (tmp_path / "last").readlink() == Path("states", name)
        assert events[-2:] == [("rename", "last"), ("fsync", inode(tmp_path))]
    # Copying made it a directory: what is in it stays.
    (tmp_path / "last").unlink()
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "mine").write_text("mine")
    files.point(tmp_path / "last", tmp_path / "states" / "one")
    assert (tmp_path / "last").resolve() == tmp_path / "states" / "one"
    assert (tmp_path / "copied-last" / "mine").read_text() == "mine"


def test_a_killed_writer_leaves_a_draft_that_is_found(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from treeify import files;"
        f"files.publish(Path({str(tmp_path / 'state')!r}),"
        " lambda draft: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / ".mine").write_text("mine")
    (tmp_path / ".state").write_text("mine")
    (draft,) = files.drafts(tmp_path, "state|other")
    assert draft.is_dir()
    assert not files.drafts(tmp_path, "stat|tate")
    files.remove(draft)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", ".state"]


def test_removing_a_link_spares_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_names_in_use_are_passed_over(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = files.unused(tmp_path / "run")
        path.mkdir()
        names.append(path.name)
    assert names == ["run", "run-2", "run-3"]


def test_a_lock_is_free_as_soon_as_it_is_left(tmp_path: Path) -> None:
    """Whether or not what was done succeeded, and whoever was forked meanwhile."""
    with pytest.raises(ValueError, match="no"), files.locked(tmp_path):
        # Another descriptor of the same lock, as a forked process has it.
        (descriptor,) = (
            int(path.name)
            for path in Path("/proc/self/fd").iterdir()
            if path.exists() and path.samefile(tmp_path)
        )
        other = os.dup(descriptor)
        raise ValueError("no")
    with files.locked(tmp_path, 0):
        pass
    os.close(other)


def test_a_file_system_without_locks_lets_everybody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with files.locked(tmp_path), files.locked(tmp_path):
        pass


def test_threads_have_drafts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    drafts: list[Path] = []

    def write(draft: Path) -> None:
        drafts.append(draft)
        if len(drafts) < 3:
            files.replace_file(path, write)
        draft.write_text(draft.name)

    files.replace_file(path, write)
    assert len(set(drafts)) == 3
    assert path.read_text() == drafts[0].name
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_but_files_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("link", "a device"), (".", "a directory")):
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            files.read_bytes(tmp_path / name, 10)
    for name in ("nothing", "a\0b"):
        with pytest.raises(OSError, match=r"No such file|null byte"):
            files.check_regular(tmp_path / name)


def test_no_more_is_read_than_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert files.read_bytes(path, 6) == b"[1, 2]"
    with pytest.raises(OSError, match="larger than 5 bytes"):
        files.read_bytes(path, 5)


def test_a_directory_is_withdrawn_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_text("")

    def dying(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", dying)
        files.withdraw(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    (draft,) = files.drafts(tmp_path, "state")
    files.remove(draft)
    assert not list(tmp_path.iterdir())


def test_links_out_of_a_folder_are_refused_but_those_of_the_hubs_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "model/snapshots/1234", tmp_path / "model/blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abcd").touch()
    (tmp_path / "other").touch()
    (snapshot / "config.json").symlink_to(blobs / "abcd")
    (snapshot / "inner").symlink_to(snapshot / "config.json")
    (snapshot / "weights").symlink_to(tmp_path / "other")
    for name in ("config.json", "inner"):
        files.require_inside(snapshot / name, snapshot)
    with pytest.raises(CheckpointError, match="weights is a link that leads out of"):
        files.require_inside(snapshot / "weights", snapshot)


def test_of_two_who_publish_at_once_the_first_stays(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def write(draft: Path) -> None:
        (draft / "file").write_text("second")
        final.mkdir()
        (final / "file").write_text("first")

    files.publish(final, write)
    assert (final / "file").read_text() == "first"
    assert [*tmp_path.iterdir()] == [final]
