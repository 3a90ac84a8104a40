"""The atomic writer under a full disk and an interrupt, and the JSON reader on files of every wrong kind."""

import errno
import os
import stat
from pathlib import Path

import pytest

from minift.errors import UserError
from minift.files.atomic import read_json, write_atomically, write_json


class Torn:
    """Chunks of which the third cannot be written, as on a full disk."""

    def __iter__(self):  # noqa: ANN204
        yield b"new "
        yield b"content"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_the_previous_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"previous")
    with pytest.raises(UserError, match=r"f: cannot be written: No space left on device; a previous file is"):
        write_atomically(path, Torn())
    assert path.read_bytes() == b"previous" and os.listdir(tmp_path) == ["f"]


def test_interrupt_removes_the_temporary_file(tmp_path: Path) -> None:
    def chunks():  # noqa: ANN202
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "f", chunks())
    assert os.listdir(tmp_path) == []


def test_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    replace = os.replace

    def record_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "f", [b"1234", b"5678"])
    assert events == ["sync 8 bytes", "replace", "sync folder"]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "\u00fc": True}
    write_json(tmp_path / "f", value)
    assert read_json(tmp_path / "f", dict) == value
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf[1]")  # a byte order mark, as some editors write it
    assert read_json(tmp_path / "f", list) == [1]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "f is missing"),
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"9" * 10_000, "cannot be read as JSON"),
        (b"[]", "holds a list, and must hold an object"),
        (b"3", "holds the value 3, and must hold an object"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_json(tmp_path / "f", dict)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_json_is_not_read_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is missing"):
        read_json(tmp_path / "pipe", dict)
