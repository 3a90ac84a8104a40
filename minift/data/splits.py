"""Train, validation and test rows: from the files of a folder, or cut out of one file.

Splits are cut out by a hash of seed and prompt: all rows of a prompt are in one split, so that no test prompt was
seen in training.
"""

from itertools import combinations
from pathlib import Path

import numpy as np

from minift.data.layouts import Pair
from minift.data.pair_file import StoredPairs
from minift.data.readers import SUFFIXES
from minift.errors import UserError

SPLIT_OF_NAME = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "eval": "val", "evaluation": "val", "test": "test",
}  # fmt: skip
CONVERTIBLE = (".parquet", ".arrow", ".feather", ".orc", ".xlsx", ".xls", ".zip", ".bz2", ".xz", ".zst")
EXACT_ROWS = 1000  # up to so many rows shares are exact; above, a prompt keeps its split when rows are added

Splits = dict[str, StoredPairs]


def parse_split(text: str) -> dict[str, float]:
    """--split "80,10,10" as percentages of train, val and test. Raises UserError."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share <= 100 for share in shares) or abs(sum(shares) - 100) > 1e-6:
        raise UserError(f"--split {text!r:.40}: must be the percentages of train,val,test, such as 80,10,10")
    if not shares[0]:
        raise UserError(f"--split {text!r:.40}: nothing is left to train on")
    return dict(zip(("train", "val", "test"), shares, strict=True))


def find_split_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """train, val and test -> file, as far as a folder has them; and a note on files that are not used.

    Raises UserError if there is no file to train on, or two for one split.
    """
    # CONVERTIBLE files cannot be read; they are taken all the same, so that their reader says how to convert them
    suffixes_of_data = (*SUFFIXES, *CONVERTIBLE, ".")
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    files: dict[str, Path] = {}
    unused = []
    for path in paths:
        stem, _, suffix = path.name.lower().removesuffix(".gz").partition(".")
        name = SPLIT_OF_NAME.get(stem)
        if name is None or f".{suffix}" not in suffixes_of_data:
            unused.append(path.name + ("/" if path.is_dir() else ""))
        elif name in files:
            raise UserError(f"{folder}: both {files[name].name} and {path.name} are {name}, keep one of them")
        else:
            files[name] = path
    if "train" not in files:
        names = ", ".join(path.name for path in paths[:8]) or "no file"
        raise UserError(f"{folder}: no train.jsonl (or {' '.join(SUFFIXES[1:])}), there is {names}; "
                        "a single file can be given to --data itself")
    notes = []
    if unused:
        more = f" and {len(unused) - 20} more" if len(unused) > 20 else ""
        notes.append(f"{folder}: files that are not used: {', '.join(unused[:20])}{more}")
    return {name: files[name] for name in ("train", "val", "test") if name in files}, notes


def cut_out(file: Path, pairs: StoredPairs, shares: dict[str, float]) -> tuple[Splits, str]:
    """`pairs` divided into train and the splits of `shares` (in percent), and a note.

    All rows of a prompt are in one split. Each split gets at least one prompt; if there are too few prompts for
    that, every row trains. One text alone is cut at line ends.
    """
    names = ["train", *shares]
    # the keys are hashes of the prompts, and unique sorts them
    keys, key_of_row, sizes = np.unique(pairs.keys, return_inverse=True, return_counts=True)
    if len(keys) < len(names) and len(keys) == 1 and not pairs[0].prompt:
        return _cut_text(file, pairs, shares)
    if len(keys) < len(names):
        parts = {name: pairs[:0] for name in names} | {"train": pairs}
        return parts, (f"{file.name}: too few different prompts ({len(keys)}) for {' + '.join(names)}: "
                       "every row trains, add rows or change --split")

    if len(pairs) <= EXACT_ROWS:
        split_of_key = _split_exactly(sizes.tolist(), shares)
    else:
        split_of_key = _split_by_hash(keys, shares)
    split_of_row = np.array(split_of_key)[key_of_row]
    parts = {name: StoredPairs(pairs.file, pairs.numbers[split_of_row == name]) for name in names}
    return parts, f"{file.name}: split by a hash of the prompt, rows: {_list_sizes(parts)}"


def _list_sizes(parts: Splits) -> str:
    return ", ".join(f"{name} {len(rows):,}" for name, rows in parts.items())


def _split_exactly(sizes: list[int], shares: dict[str, float]) -> list[str]:
    """Splits with the exact number of rows, as far as prompts with several rows allow it.

    `sizes` are the rows of each key, in the order of the hashes. Returns the split of each key.
    """
    target_rows = _round_shares(sum(sizes), shares)
    split_of_key = ["train"] * len(sizes)
    free = list(range(len(sizes)))  # keys that are still in train
    to_leave = len(shares)  # keys that must be left over: one for each split after this one, and one for train
    for name in reversed(shares):  # test first, as in _split_by_hash
        taken: list[int] = []
        rows = 0
        for key in free:
            if rows + sizes[key] <= target_rows[name] and len(free) - len(taken) > to_leave:
                taken.append(key)
                rows += sizes[key]
        if not taken:  # every prompt has more rows than this split should have
            taken = [min(free, key=sizes.__getitem__)]
        to_leave -= 1
        for key in taken:
            split_of_key[key] = name
        free = [key for key in free if split_of_key[key] == "train"]
    return split_of_key


def _round_shares(total: int, shares: dict[str, float]) -> dict[str, int]:
    """The number of rows of each split, at least 1. The largest remainders are rounded up until all rows are used."""
    exact = {"train": total * (100 - sum(shares.values())) / 100}
    exact |= {name: total * share / 100 for name, share in shares.items()}
    rows = {name: int(value + 1e-6) for name, value in exact.items()}  # 1e-6: 7.9999999 by rounding errors is 8
    by_remainder = sorted(exact, key=lambda name: rows[name] - exact[name])
    for name in by_remainder[: total - sum(rows.values())]:
        rows[name] += 1
    return {name: max(1, count) for name, count in rows.items()}


def _split_by_hash(keys: np.ndarray, shares: dict[str, float]) -> list[str]:
    """Splits by ranges of the hash: with 10 % test and 10 % val, test has the hashes in 0..0.1, val those in 0.1..0.2.

    `keys` are the sorted hashes. A prompt keeps its split when other rows are added or removed.
    """
    points = (keys >> np.uint64(16)) / 2**48  # in [0, 1)
    split_of_key = ["train"] * len(keys)
    begin, share = 0, 0.0
    to_leave = len(shares)  # as in _split_exactly
    for name in reversed(shares):  # test first, so that the share of val does not change it
        share += shares[name] / 100
        end = int(np.searchsorted(points, share))
        end = min(max(end, begin + 1), len(keys) - to_leave)
        split_of_key[begin:end] = [name] * (end - begin)
        begin = end
        to_leave -= 1
    return split_of_key


def _cut_text(file: Path, pairs: StoredPairs, shares: dict[str, float]) -> tuple[Splits, str]:
    """One text cut at line ends into consecutive parts: train, then the splits of `shares`. And a note."""
    pair = pairs[0]
    text = pair.completion
    percents = {"train": 100 - sum(shares.values()), **shares}
    parts: Splits = {name: pairs[:0] for name in percents}
    sizes = []
    begin, percent = 0, 0.0  # of the text, before the part
    for name in percents:
        percent += percents[name]
        end = int(len(text) * percent / 100)
        if percent >= 100 - 1e-6:
            end = len(text)
        else:
            end = text.find("\n", end) + 1 or end  # find gives -1 if no line ends after it
        part = text[begin:end]
        if part.strip():
            line = text[:begin].count("\n") + 1
            number = pairs.file.append(Pair("", part, f"{pair.where.rpartition(':')[0]}:{line}"))
            parts[name] = StoredPairs(pairs.file, [number])
        sizes.append(f"{name} {sum(len(row.completion) for row in parts[name]):,}")
        begin = end
    return parts, f"{file.name}: one text, cut in order at line ends, characters: {', '.join(sizes)}"


def overlap_notes(splits: Splits) -> list[str]:
    """A line for each two splits that have prompts in common."""
    keys = {name: np.unique(pairs.keys) for name, pairs in splits.items()}
    shared = {(a, b): len(np.intersect1d(keys[a], keys[b], assume_unique=True)) for a, b in combinations(splits, 2)}
    return [f"{b}: {count:,} of its {len(keys[b]):,} different prompts are also in {a}"
            for (a, b), count in shared.items() if count]
