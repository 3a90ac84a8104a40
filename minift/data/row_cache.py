"""The rows of large files, kept on the disk for the next start with the same file, tokenizer and options.

They are in $XDG_CACHE_HOME/minift/rows, or ~/.cache/minift/rows, a folder for each key. It may be deleted at any time:
a run that reads it keeps its files open.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minift.data.lines import file_errors
from minift.data.pair_file import PAIRS, CannotStore, PairFile
from minift.data.quality import Facts
from minift.data.row_store import TOKENS, RowStore

LEAST_BYTES = 10 * 2**20  # smaller files are tokenized in a few seconds
MOST_BYTES = 20 * 2**30  # of all keys together; those that were not used for longest are deleted first
ARRAYS = "arrays.npz"
REPORT = "report.json"  # written last: its own hash, and those of the other files


@dataclass
class Loaded:
    """The rows of all splits, the row numbers of each, the lines of the data report, and facts on the rows' quality."""

    store: RowStore
    splits: dict[str, range]
    lines: list[str]
    quality: Facts


def is_large(files: list[Path]) -> bool:
    return sum(file.stat().st_size for file in files if file.is_file()) >= LEAST_BYTES


def find_key(files: list[Path], settings: Any) -> str:
    """A hash of the content of files, of the settings that their rows depend on, and of this version's code. Raises
    UserError if a file cannot be read."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    code = sorted(Path(__file__).parent.glob("*.py"))
    for path in [*code, *files]:
        with file_errors(path), open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def load_or_make(key: str, make: Callable[[Path | None], Loaded]) -> tuple[Loaded, str]:
    """The rows of the cache, or those that `make(folder)` writes into a folder, which become those of the cache. And a
    note on the cache. Where the cache cannot be written, they are made in temporary files: `make(None)`.

    Of several processes that need the same rows, one makes them and the others wait.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minift" / "rows"
    entry = folder / key
    loaded = read(entry)
    if loaded is not None:
        with contextlib.suppress(OSError):  # the cache may be read-only
            os.utime(entry)
        return loaded, f"rows from the cache in {entry} (--no-cache reads the data again)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f"{key}.lock"):
            loaded = read(entry)  # another process may have made it while this one waited
            if loaded is None:
                with new_folder(entry) as temporary:
                    loaded = make(temporary)
                    write(temporary, loaded)
                delete_oldest(folder, entry)
        size = sum(file.stat().st_size for file in entry.iterdir())
        return loaded, f"rows kept for the next start: {entry}, {size / 1e9:.1f} GB, may be deleted (--no-cache: none)"
    except (OSError, CannotStore) as error:
        # the files of rows that are complete can be used after their folder is deleted
        return loaded or make(None), f"rows are not kept for the next start: {error}"


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or the process ends
        yield


@contextlib.contextmanager
def new_folder(entry: Path) -> Iterator[Path]:
    """A folder beside `entry` that takes its place at the end. It is deleted after an error."""
    temporary = entry.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(entry, ignore_errors=True)  # if it is damaged
        temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(folder: Path, loaded: Loaded) -> None:
    """Write all that is not yet in the folder: the texts and the tokens are."""
    store = loaded.store
    store.pair_file.file.flush()
    np.savez(folder / ARRAYS, offsets=store.offsets, spans=store.spans, span_offsets=store.span_offsets,
             pairs=store.pairs, pair_offsets=np.array(store.pair_file.offsets))
    hashes = {name: file_hash(folder / name) for name in (PAIRS, TOKENS, ARRAYS)}
    splits = {name: [numbers.start, numbers.stop] for name, numbers in loaded.splits.items()}
    text = json.dumps({"hashes": hashes, "splits": splits, "lines": loaded.lines, "quality": loaded.quality,
                       "digest": store.digest})
    (folder / REPORT).write_text(f"{text_hash(text)}\n{text}", encoding="utf-8")


def read(entry: Path) -> Loaded | None:
    """The rows in a folder of the cache; None if there is none, or if a file is missing or damaged."""
    try:
        own_hash, _, text = (entry / REPORT).read_text(encoding="utf-8").partition("\n")
        if own_hash != text_hash(text):
            return None
        report = json.loads(text)
        if any(file_hash(entry / name) != value for name, value in report["hashes"].items()):
            return None
        with np.load(entry / ARRAYS) as arrays:
            pair_file = PairFile(open(entry / PAIRS, "rb"), array("q", arrays["pair_offsets"].tobytes()))
            rows = {name: arrays[name] for name in ("offsets", "spans", "span_offsets", "pairs")}
        tokens = np.asarray(np.memmap(entry / TOKENS, np.int32, "r"))
        store = RowStore(tokens, **rows, pair_file=pair_file, digest=report["digest"])
        splits = {name: range(*ends) for name, ends in report["splits"].items()}
        return Loaded(store, splits, report["lines"], report["quality"])
    except (OSError, ValueError):  # UnicodeDecodeError is a ValueError
        return None


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete_oldest(folder: Path, newest: Path) -> None:
    """Delete the entries that were not used for longest, until the cache has at most MOST_BYTES; `newest` stays."""
    entries = sorted(folder.glob("?" * 32), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.iterdir())
        if total > MOST_BYTES and entry != newest:
            shutil.rmtree(entry, ignore_errors=True)
