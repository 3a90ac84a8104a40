"""Pairs of texts on the disk, a JSON line for each, so that the memory for a file's rows does not grow with its texts.

In memory a pair takes 24 bytes: the place of its line, and two hashes.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minift.data.layouts import Pair
from minift.errors import UserError

PAIRS = "pairs.jsonl"


def split_key(pair: Pair) -> str:
    """Rows with the same key stay in one split: those with the same prompt, or with the same text alone."""
    return pair.prompt or pair.completion


class CannotStore(UserError):
    """The disk has no room for the rows."""

    def __init__(self, error: OSError):
        super().__init__(f"the rows cannot be written to {tempfile.gettempdir()}: {error.strerror or error}; free about"
                         " twice the space that the data take, or set TMPDIR to another folder")


def open_file(folder: Path | None, name: str) -> BinaryIO:
    """A new file for writing and reading; None: a temporary one, which ends with the process. Raises CannotStore."""
    try:
        return open(folder / name, "w+b") if folder else tempfile.TemporaryFile()
    except OSError as error:
        raise CannotStore(error) from None


def close_quietly(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # a full disk was reported when the file was written
        file.close()


class PairFile:
    """A file of pairs. `offsets`: where each line begins, and where the last one ends."""

    def __init__(self, file: BinaryIO, offsets: Sequence[int]):
        self.file = file
        self.offsets = offsets
        weakref.finalize(self, close_quietly, file)

    def read(self, number: int) -> Pair:
        begin, end = self.offsets[number], self.offsets[number + 1]
        line = os.pread(self.file.fileno(), end - begin, begin)
        prompt, completion, where, learned = json.loads(line.decode("utf-8", "surrogatepass"))
        return Pair(prompt, completion, where, tuple(map(tuple, learned)))


class NewPairFile(PairFile):
    """A file of pairs that grows. `folder`: None is a temporary file. The disk needs as much room as the texts."""

    def __init__(self, seed: int, folder: Path | None):
        super().__init__(open_file(folder, PAIRS), array("q", [0]))
        self.seed = seed
        self.keys = array("Q")  # a hash of the seed and of each pair's split_key
        self.hashes = array("q")  # of each pair's texts, to count the pairs that repeat another one

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, pair: Pair) -> int:
        """The number of the new pair. Raises CannotStore."""
        line = json.dumps((pair.prompt, pair.completion, pair.where, pair.learned), ensure_ascii=False) + "\n"
        # surrogatepass: the name of a file, which is in `where`, need not be valid UTF-8
        encoded = line.encode("utf-8", "surrogatepass")
        try:
            self.file.write(encoded)
        except OSError as error:
            raise CannotStore(error) from None
        self.offsets.append(self.offsets[-1] + len(encoded))
        key = f"{self.seed}\n{split_key(pair)}".encode("utf-8", "surrogatepass")
        self.keys.append(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
        self.hashes.append(hash((pair.prompt, pair.completion)))
        return len(self) - 1

    def read(self, number: int) -> Pair:
        """Raises CannotStore."""
        try:
            self.file.flush()  # the pairs that were appended last
        except OSError as error:
            raise CannotStore(error) from None
        return super().read(number)


class StoredPairs(Sequence[Pair]):
    """Some pairs of a file; each is read when it is asked for."""

    def __init__(self, file: NewPairFile, numbers: Sequence[int]):
        self.file = file
        self.numbers = np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | slice) -> "Pair | StoredPairs":
        if isinstance(index, slice):
            return StoredPairs(self.file, self.numbers[index])
        return self.file.read(self.numbers[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def keys(self) -> np.ndarray:
        """The hash of each pair's seed and split_key, as 64 bits."""
        return np.array(self.file.keys)[self.numbers]  # a copy, since an array that is viewed cannot grow

    def count_repeats(self) -> int:
        """The number of pairs that repeat an earlier one exactly."""
        return len(self) - len(np.unique(np.array(self.file.hashes)[self.numbers]))
