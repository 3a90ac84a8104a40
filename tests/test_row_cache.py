"""The cache of tokenized rows: the same rows as without it, whatever happens to its files."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import jsonl, load, numbered, write
from scripts import QUICK, trained, write_pairs

from minift.data import dataset, pair_file, row_cache, row_store
from minift.errors import UserError

KEPT = "rows kept for the next start: "
READ = "rows from the cache in "


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is used for files of any size."""
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minift" / "rows"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [*numbered(40), {"prompt": "an end", "completion": "x<|endoftext|>"}]
    return write(tmp_path / "rows.jsonl", jsonl(rows))


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def plain(path: Path, **options) -> tuple:
    rows, lines = load(path, 60, cache=False, **options)
    return {name: list(found) for name, found in rows.items()}, rows["train"].store.digest, lines


def check(path: Path, note: str, **options) -> None:
    """Load with the cache; the result is that of a load without, and the last line of the report begins with `note`."""
    rows, lines = load(path, 60, **options)
    found = {name: list(examples) for name, examples in rows.items()}
    assert (found, rows["train"].store.digest, lines[:-1]) == plain(path, **options)
    assert lines[-1].startswith(note)


def test_the_second_start_reads_no_file(cache, data, monkeypatch):
    check(data, KEPT)
    expected = load(data, 60, cache=False)[0]
    monkeypatch.setattr(dataset, "read_pairs", None)
    rows, lines = load(data, 60)
    assert lines[-1].startswith(READ) and str(entries(cache)[0]) in lines[-1]
    for name in expected:
        assert list(rows[name]) == list(expected[name])


@pytest.mark.parametrize("name, content", {
    "a.txt": "".join(f"line {i} of a text that becomes several windows\n" for i in range(40)),
    "a.csv": "prompt,completion\n" + "".join(f"{i},b\n" for i in range(9)),
}.items())
def test_other_kinds_of_files(cache, tmp_path, name, content):
    path = write(tmp_path / name, content)
    check(path, KEPT)
    check(path, READ)


def test_whatever_the_rows_depend_on_changes_the_key(cache, data, tmp_path, monkeypatch):
    check(data, KEPT)
    for options in ({"seed": 1}, {"rows": 5}, {"join": "-"}, {"split": "50,25,25"}, {"max_length": 30},
                    {"control_tokens": "text"}, {"template": "{prompt}?"}):
        check(data, KEPT, **options)
        check(data, READ, **options)
    content = data.read_text()
    write(data, content.replace("answer 7", "answer x"))  # of the same length
    check(data, KEPT)
    write(data, content)
    check(data, READ)
    code = tmp_path / "code"
    shutil.copytree(Path(row_cache.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
    with open(code / "tokens.py", "a") as file:
        file.write("# a change\n")
    monkeypatch.setattr(row_cache, "__file__", str(code / "row_cache.py"))
    check(data, KEPT)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "one bit", "missing"])
@pytest.mark.parametrize("name", [pair_file.PAIRS, row_store.TOKENS, row_cache.ARRAYS, row_cache.REPORT])
def test_a_damaged_file_is_noticed_and_made_again(cache, data, damage: Callable[[Path], None], name):
    check(data, KEPT)
    (entry,) = entries(cache)
    damage(entry / name)
    check(data, KEPT)
    check(data, READ)
    assert entries(cache) == [entry]


def test_a_killed_process_leaves_nothing_that_is_used(cache, data):
    check(data, KEPT)
    (entry,) = entries(cache)
    half = entry.with_suffix(".tmp")
    entry.rename(half)
    truncate(half / pair_file.PAIRS)
    check(data, KEPT)
    assert entries(cache) == [entry]


def test_an_error_of_the_data_leaves_nothing(cache, tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl(numbered(9)) + "{bad\n")
    with pytest.raises(UserError, match="rows.jsonl:10: not valid JSON"):
        load(path, 60)
    assert entries(cache) == []


def test_no_cache(cache, data):
    load(data, 60, cache=False)
    assert not cache.exists()


def test_a_small_file_has_none(cache, data, monkeypatch):
    monkeypatch.setattr(row_cache, "LEAST_BYTES", data.stat().st_size + 1)
    _, lines = load(data, 60)
    assert not cache.exists() and not lines[-1].startswith(KEPT)


def test_a_cache_that_cannot_be_written_is_a_note(cache, data, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file is here")
    check(data, "rows are not kept for the next start: ")
    cache.unlink()
    opened = pair_file.open_file

    def full(folder: Path | None, name: str) -> object:
        return open("/dev/full", "w+b") if folder else opened(folder, name)

    monkeypatch.setattr(pair_file, "open_file", full)
    check(data, "rows are not kept for the next start: ")
    assert entries(cache) == []


def test_rows_that_are_made_are_used_although_they_cannot_be_kept(cache, data, monkeypatch):
    def full(*arguments: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_cache.np, "savez", full)
    made, make = [], dataset.make_rows
    monkeypatch.setattr(dataset, "make_rows", lambda *a: made.append(a) or make(*a))
    rows, lines = load(data, 60)
    assert len(made) == 1 and entries(cache) == []
    assert lines[-1].endswith("are not kept for the next start: [Errno 28] No space left on device")
    assert list(rows["train"]) == plain(data)[0]["train"]


def test_a_cache_that_is_read_only_is_read(cache, data, monkeypatch):
    check(data, KEPT)

    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(row_cache.os, "utime", refuse)
    monkeypatch.setattr(row_cache, "lock", refuse)
    check(data, READ)


def test_of_two_processes_one_makes_the_rows(cache, data, monkeypatch):
    """Threads in the place of processes: each opens the lock by itself, as a process does."""
    make, made, found = dataset.make_rows, [], []
    waiting = threading.Event()

    def slow(*arguments: object) -> row_cache.Loaded:
        made.append(arguments)
        waiting.wait(60)
        return make(*arguments)

    monkeypatch.setattr(dataset, "make_rows", slow)
    lock = row_cache.lock
    monkeypatch.setattr(row_cache, "lock", lambda path: (waiting.set() if made else None, lock(path))[1])
    threads = [threading.Thread(target=lambda: found.append(load(data, 60))) for _ in range(2)]
    threads[0].start()
    while not made:
        threads[0].join(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 2
    assert list(found[0][0]["train"]) == list(found[1][0]["train"])


def test_the_cache_is_bounded(cache, data, monkeypatch):
    for seed in range(3):
        check(data, KEPT, seed=seed)
        (newest,) = [path for path in entries(cache) if path.stat().st_mtime > 1000]
        os.utime(newest, (seed, seed))  # the oldest first
    assert len(entries(cache)) == 3
    size = sum(file.stat().st_size for file in newest.iterdir())
    monkeypatch.setattr(row_cache, "MOST_BYTES", int(2.5 * size))
    check(data, READ, seed=0)  # used now, so it stays
    check(data, KEPT, seed=3)
    assert newest not in entries(cache) and len(entries(cache)) == 2
    check(data, READ, seed=0)


@pytest.mark.usefixtures("quick")
def test_a_run_from_the_cache_has_the_same_losses(cache, model_folder, tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    losses = []
    for number, note in enumerate((KEPT, READ)):
        out = tmp_path / f"run{number}"
        printed = trained("--model", model_folder, "--data", pairs, *QUICK, "--steps", 3, "--out", out)
        assert note in printed
        losses.append([json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
