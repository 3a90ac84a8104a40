"""Train, validation and test rows: from the files of a folder, or cut out of one file."""

import hashlib
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from minift.data.pairs import Pair
from minift.data.readers import SUFFIXES
from minift.errors import UserError

SPLIT_OF_NAME = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "eval": "val", "evaluation": "val", "test": "test",
}  # fmt: skip
CONVERTIBLE = (".parquet", ".arrow", ".feather", ".orc", ".xlsx", ".xls", ".zip", ".bz2", ".xz", ".zst")
EXACT_ROWS = 1000  # up to here shares are exact to the row; above, a prompt keeps its split as the file grows

Splits = dict[str, list[Pair]]


def parse_split(text: str) -> dict[str, float]:
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
    """train, val, test -> file, in that order, as far as the folder has them, and a note on unused files.
    Raises UserError if there is no file to train on, or two for one split."""
    try:
        there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    files: dict[str, Path] = {}
    unused = []
    for path in there:
        stem, *suffixes = path.name.lower().removesuffix(".gz").split(".")
        name = SPLIT_OF_NAME.get(stem)
        if name is None or len(suffixes) > 1 or f".{suffixes[-1] if suffixes else ''}" not in (
                *SUFFIXES, *CONVERTIBLE, "."):
            unused.append(path.name + ("/" if path.is_dir() else ""))
        elif name in files:
            raise UserError(f"{folder}: both {files[name].name} and {path.name} are {name}, keep one of them")
        else:
            files[name] = path
    if "train" not in files:
        names = ", ".join(path.name for path in there[:8]) or "no file"
        raise UserError(f"{folder}: no train.jsonl (or {' '.join(SUFFIXES[1:])}), there is {names}; "
                        "a single file can be given to --data itself")
    notes = []
    if unused:
        more = f" and {len(unused) - 20} more" if len(unused) > 20 else ""
        notes.append(f"{folder}: files that are not used: {', '.join(unused[:20])}{more}")
    return {name: files[name] for name in ("train", "val", "test") if name in files}, notes


def split_key(pair: Pair) -> str:
    """Rows with the same key stay in one split: those of a prompt, or a text alone."""
    return pair.prompt or pair.completion


def cut_out(file: Path, pairs: list[Pair], shares: dict[str, float], seed: int) -> tuple[Splits, str]:
    """`pairs` parted into train and the splits of `shares` (percent), whole prompts at a time, and a note.

    Prompts are sorted by a hash of seed and prompt. A split that its share would leave empty takes one
    prompt, so that a handful of rows is enough. With fewer prompts than splits every row trains.
    """
    sizes = Counter(split_key(pair) for pair in pairs)
    names = ["train", *shares]
    if len(sizes) < len(names) and len(sizes) == 1 and not pairs[0].prompt:
        return _cut_text(file, pairs[0], shares)
    if len(sizes) < len(names):
        parts = {name: [] for name in names} | {"train": pairs}
        return parts, (f"{file.name}: too few different prompts ({len(sizes)}) for {' + '.join(names)}: "
                       "every row trains, add rows or change --split")
    points = {key: _hash_point(seed, key) for key in sizes}
    if len(pairs) <= EXACT_ROWS:
        split_of_key = _split_exactly(sorted(sizes, key=points.__getitem__), sizes, shares)
    else:
        split_of_key = _split_by_hash(points, shares)
    parts = {name: [] for name in names}
    for pair in pairs:
        parts[split_of_key[split_key(pair)]].append(pair)
    return parts, f"{file.name}: split by a hash of the prompt, rows: {_list_sizes(parts)}"


def _list_sizes(parts: Splits) -> str:
    return ", ".join(f"{name} {len(rows):,}" for name, rows in parts.items())


def _hash_point(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 256**6


def _split_exactly(ordered: list[str], sizes: Counter[str], shares: dict[str, float]) -> dict[str, str]:
    """Shares exact to the row, as far as prompts with several rows allow it."""
    total = sum(sizes.values())
    wanted = _round_shares(total, shares)
    split_of_key = dict.fromkeys(ordered, "train")
    free = ordered
    for left, name in zip(range(len(shares), 0, -1), reversed(shares), strict=True):  # test first
        taken: list[str] = []
        rows = 0
        for key in free:
            if rows + sizes[key] <= wanted[name] and len(free) - len(taken) > left:
                taken.append(key)
                rows += sizes[key]
        if not taken:  # every prompt has more rows than this split should have
            taken = [min(free, key=sizes.__getitem__)]
        split_of_key |= dict.fromkeys(taken, name)
        free = [key for key in free if split_of_key[key] == "train"]
    return split_of_key


def _round_shares(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Rows of each split: the largest remainders are rounded up, so that they sum up to `total`."""
    exact = {"train": total * (100 - sum(shares.values())) / 100}
    exact |= {name: total * share / 100 for name, share in shares.items()}
    rows = {name: int(value + 1e-6) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: rows[name] - exact[name])
    for name in by_remainder[: total - sum(rows.values())]:
        rows[name] += 1
    return {name: max(1, count) for name, count in rows.items()}


def _split_by_hash(points: dict[str, float], shares: dict[str, float]) -> dict[str, str]:
    """A prompt's hash alone says its split: it keeps it when other rows come or go."""
    ordered = sorted(points, key=points.__getitem__)
    values = np.sort(list(points.values()))
    split_of_key = dict.fromkeys(points, "train")
    begin, share = 0, 0.0
    for left, name in zip(range(len(shares), 0, -1), reversed(shares), strict=True):  # test first
        share += shares[name] / 100
        end = int(np.searchsorted(values, share))
        end = min(max(end, begin + 1), len(ordered) - left)  # one prompt for each of the splits still to come
        split_of_key |= dict.fromkeys(ordered[begin:end], name)
        begin = end
    return split_of_key


def _cut_text(file: Path, pair: Pair, shares: dict[str, float]) -> tuple[Splits, str]:
    """One text cut into consecutive parts at line ends: the first trains, the last is the test's."""
    text = pair.completion
    parts: Splits = {"train": [], **{name: [] for name in shares}}
    begin, share = 0, 100 - sum(shares.values())
    for name, following in zip(parts, [*shares.values(), 0.0], strict=True):
        end = len(text) * share / 100
        at = len(text) if share >= 100 - 1e-6 else text.find("\n", int(end)) + 1 or int(end)
        part = text[begin:at]
        if part.strip():
            line = text[:begin].count("\n") + 1
            parts[name].append(Pair("", part, f"{pair.where.rpartition(':')[0]}:{line}"))
        begin, share = at, share + following
    sizes = ", ".join(f"{name} {sum(len(row.completion) for row in rows):,}" for name, rows in parts.items())
    return parts, f"{file.name}: one text, cut in order at line ends, characters: {sizes}"


def overlap_notes(splits: Splits) -> list[str]:
    prompts = {name: {split_key(pair) for pair in pairs} for name, pairs in splits.items()}
    shared = {(a, b): len(prompts[a] & prompts[b]) for a, b in combinations(splits, 2)}
    return [f"{b}: {count:,} of its {len(prompts[b]):,} different prompts are also in {a}"
            for (a, b), count in shared.items() if count]
