"""Rows of tokens in flat arrays: four bytes a token, and no Python object for a row until it is asked for.

The tokens are a file that is mapped into memory, so the system can take their memory back when it is short.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minift.data.pair_file import CannotStore, PairFile, open_file
from minift.data.tokens import Example

TOKENS = "tokens.int32"
HASHED = ("train", "val")  # splits: a run resumes with the same rows of these alone


@dataclass(frozen=True)
class RowStore:
    """Row i has tokens[offsets[i] : offsets[i + 1]], spans[span_offsets[i] : span_offsets[i + 1]], and the pair with
    the number pairs[i]. R rows, S spans."""

    tokens: np.ndarray  # int32
    offsets: np.ndarray  # (R + 1,)
    spans: np.ndarray  # (S, 2): begin and end in the row
    span_offsets: np.ndarray  # (R + 1,)
    pairs: np.ndarray  # (R,)
    pair_file: PairFile
    digest: str  # a hash of the rows of HASHED


class RowWriter:
    """Collects rows into a store. `folder`: None is a temporary file."""

    def __init__(self, folder: Path | None):
        self.file = open_file(folder, TOKENS)
        self.offsets, self.span_offsets = array("q", [0]), array("q", [0])
        self.spans, self.pairs = array("i"), array("q")
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.pairs)

    def append(self, split: str, row: Example, pair_number: int) -> None:
        """Raises CannotStore."""
        try:
            self.file.write(array("i", row.ids))
        except OSError as error:
            raise CannotStore(error) from None
        self.offsets.append(self.offsets[-1] + len(row.ids))
        for span in row.spans:
            self.spans.extend(span)
        self.span_offsets.append(len(self.spans) // 2)
        self.pairs.append(pair_number)
        if split in HASHED:
            one_span_to_the_end = len(row.spans) == 1 and row.spans[0][1] == len(row.ids)
            learned = row.spans[0][0] if one_span_to_the_end else row.spans
            self.digest.update(f"{split} {learned} {row.ids};".encode())

    def finish(self, pair_file: PairFile) -> RowStore:
        """The store of the rows. Raises CannotStore."""
        try:
            self.file.flush()
        except OSError as error:
            raise CannotStore(error) from None
        # an empty file cannot be mapped; the map needs no open file
        tokens = np.asarray(np.memmap(self.file, np.int32, "r")) if len(self) else np.empty(0, np.int32)
        self.file.close()
        spans = np.array(self.spans, np.int32).reshape(-1, 2)
        return RowStore(tokens, np.array(self.offsets), spans, np.array(self.span_offsets), np.array(self.pairs),
                        pair_file, self.digest.hexdigest())


class Examples(Sequence[Example]):
    """Rows of a store, each made when it is asked for, with its pair read from the disk."""

    def __init__(self, store: RowStore, numbers: range):
        self.store = store
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return Examples(self.store, self.numbers[index])
        number, store = self.numbers[index], self.store
        begin, end = store.offsets[number : number + 2]
        first, last = store.span_offsets[number : number + 2]
        spans = tuple(map(tuple, store.spans[first:last].tolist()))
        return Example(store.tokens[begin:end].tolist(), spans, store.pair_file.read(store.pairs[number]))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row."""
        return np.diff(self.store.offsets)[self._indices]

    @property
    def last_tokens(self) -> np.ndarray:
        return self.store.tokens[self.store.offsets[1:][self._indices] - 1]

    @property
    def _indices(self) -> np.ndarray:
        return np.arange(self.numbers.start, self.numbers.stop, self.numbers.step)
