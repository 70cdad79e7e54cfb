"""Where output goes: links stay, pipes are sent it, devices and protected files are refused."""

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from firsttok.errors import BadInputError, CacheError, FirsttokError
from firsttok.sinks import atomic_path, check_output

ROOT = Path(__file__).parent.parent


def put(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, near, link = tmp_path / "far" / "target", tmp_path / "near", tmp_path / "link"
    target.write_text("old", "utf-8")
    near.symlink_to("far/target")
    link.symlink_to(near)
    check_output(link)
    put(link)
    assert link.is_symlink()
    assert near.is_symlink()
    assert target.read_text("utf-8") == "new"
    assert not target.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "link", "near", "target"]


def test_a_link_to_nothing_makes_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    put(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text("utf-8") == "new"


def test_a_file_keeps_its_permissions_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", "utf-8")
    path.chmod(0o640)
    put(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    plain = tmp_path / "plain"
    plain.touch()
    put(tmp_path / "made")
    assert (tmp_path / "made").stat().st_mode == plain.stat().st_mode


def test_another_hard_link_keeps_the_old_content(tmp_path: Path) -> None:
    """As a copy of a run made of hard links must."""
    path, copy = tmp_path / "file", tmp_path / "copy"
    path.write_text("old", "utf-8")
    copy.hardlink_to(path)
    put(path)
    assert (path.read_text("utf-8"), copy.read_text("utf-8")) == ("new", "old")


def test_a_fifo_is_sent_the_content_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_output(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    put(fifo, "x" * 100_000)
    reader.join(10)
    assert got == [b"x" * 100_000]
    assert fifo.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_the_null_device_takes_everything_and_stays() -> None:
    before = Path(os.devnull).stat()
    check_output(Path(os.devnull))
    put(Path(os.devnull), "x" * 100_000)
    after = Path(os.devnull).stat()
    assert (after.st_mode, after.st_rdev) == (before.st_mode, before.st_rdev)


PRINTS = """
import sys
from pathlib import Path
from firsttok.sinks import atomic_path, check_output
print("before")
check_output(Path(sys.argv[1]))
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("sent\\n", "utf-8")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_by_its_path_is_what_is_printed_to(
    name: str, to: str, tmp_path: Path
) -> None:
    """A file that it leads to is neither cut off nor replaced, which would lose what is printed."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    command = [sys.executable, "-c", PRINTS, str(tmp_path / name)]
    with (tmp_path / "out").open("wb") as out:
        where = subprocess.PIPE if to == "pipe" else out
        done = subprocess.run(command, stdout=where, cwd=ROOT, check=True, timeout=60)
    text = done.stdout if to == "pipe" else (tmp_path / "out").read_bytes()
    assert text == b"before\nsent\nafter\n"


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def bound(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def protected(path: Path) -> Path:
    path.write_text("old", "utf-8")
    path.chmod(0o444)
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def below_a_file(path: Path) -> Path:
    path.write_text("old", "utf-8")
    return path / "x"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "full device": (lambda _: Path("/dev/full"), "/dev/full is a device"),
    "zero device": (lambda _: Path("/dev/zero"), "/dev/zero is a device"),
    "link to a device": (
        lambda path: path.symlink_to("/dev/zero") or path,
        "is a device; name a file, a pipe or /dev/null",
    ),
    "folder": (folder, "is a folder; name a file"),
    "socket": (bound, "is a socket; name a file"),
    "read-only": (protected, "may not be written to; name another file"),
    "loop of links": (loop, "symbolic links"),
    "below a file": (below_a_file, "Not a directory"),
    "long name": (lambda path: path.with_name("x" * 300), "too long"),
    "NUL": (lambda path: path.with_name("a\0b"), "null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[name]
    path = make(tmp_path / "x")
    before = {each: each.lstat().st_mode for each in tmp_path.rglob("*")}
    with pytest.raises(FirsttokError, match=sentence):
        check_output(path)
    with pytest.raises(FirsttokError, match=sentence), atomic_path(path):
        pytest.fail("the work was done")
    assert {each: each.lstat().st_mode for each in tmp_path.rglob("*")} == before


def test_a_folder_that_is_not_there_is_named_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist; make it first"):
        check_output(tmp_path / "none" / "x")
    (tmp_path / "link").symlink_to("none/x")
    with pytest.raises(BadInputError, match="does not exist; make it first"):
        check_output(tmp_path / "link")


def test_a_name_as_long_as_can_be_is_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        put(tmp_path / name)
        assert (tmp_path / name).read_text("utf-8") == "new"


def fail(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half", "utf-8")
        raise error


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", "utf-8")
    for error, seen in (
        (OSError(errno.ENOSPC, "No space left on device"), CacheError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(seen):
            fail(path, error)
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_that_has_gone_is_no_full_disk(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            put(Path(f"/dev/fd/{writer}"), "x" * 100_000)
    finally:
        os.close(writer)
