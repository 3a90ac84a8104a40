"""Pairs in; splits, tokens, masks and batches out."""

import copy
import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minift.data.pairs import READERS, Pair, read_file
from minift.errors import UserError, tokenizer_faults
from minift.model.packing import Row
from minift.options import option

SPLIT_OF_NAME = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
}  # fmt: skip
POOL_BATCHES = 20  # SAMSum in batches of 8: 3 % of the tokens are padding (10: 6 %, 50: 1 %, no pools: 36 %)


@dataclass(frozen=True)
class DataOptions:
    data: str | None = option(None, "pairs: a .jsonl, .json, .csv, .tsv or .txt file, or a folder of "
                                    "train, val and test")
    prompt_field: str | None = option(None, "the prompt's field (default: known names are recognised)")
    completion_field: str | None = option(None, "the completion's field (default: likewise)")
    template: str | None = option(None, "the prompt, with fields in braces: '{dialogue}\\n\\nSummary:'; "
                                        "\\n is a line end, {{ and }} are braces")
    split: str = option("80,10,10", "percent of train, val and test, as far as no file gives them")
    skip_bad: bool = option(False, "count malformed rows and go on, instead of stopping at the first")
    max_length: int | None = option(None, "tokens of a row at most: prompt, completion and end-of-text "
                                          "(default: as many as the model has positions for)")
    rows: int | None = option(None, "train on the first so many usable training rows only")


@dataclass(frozen=True)
class Pairs:
    """The three splits, each in its file's order, and notes to print before training, one line each."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
    notes: list[str]


@dataclass(frozen=True)
class Example(Row):
    """A row as tokens, prompt + completion + end-of-text, and the pair that it was made of."""

    pair: Pair

    @property
    def prompt(self) -> list[int]:
        """The tokens before the last span: what a completion is generated from."""
        return self.ids[: self.spans[-1][0]]


def read_pairs(options: DataOptions, seed: int) -> Pairs:
    """The pairs of a file or folder in three splits; a split whose share is 0 is empty.

    What no file gives is cut out of the training file by a hash of `seed` and prompt: a prompt never stands
    on two sides, and keeps its side when other rows come or go. Raises UserError for all that is wrong with
    options or files.
    """
    if not options.data:
        raise UserError("no data: give --data a file of pairs, or a folder with train, val and test")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows {options.rows}: must be 1 or more")
    shares = _parse_split(options.split)
    path = Path(options.data)
    files = _split_files(path) if os.path.isdir(path) else {"train": path}
    splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    notes: list[str] = []
    for name, file in files.items():
        splits[name], said = read_file(file, options.prompt_field, options.completion_field, options.template,
                                       options.skip_bad)
        notes += said
    missing = {name: share for name, share in shares.items() if name not in files and share}
    if missing:
        splits |= _cut_out(files["train"], splits["train"], missing, seed)
        sizes = ", ".join(f"{name} {len(splits[name]):,}" for name in ("train", *missing))
        notes.append(f"{files['train'].name}: split by a hash of the prompt, rows: {sizes}")
    if options.rows is not None:
        found = len(splits["train"])
        splits["train"] = splits["train"][: options.rows]
        notes.append(f"train: the first {len(splits['train']):,} of {found:,} rows (--rows)")
    return Pairs(**splits, notes=notes + _overlap_notes(splits))


def _parse_split(text: str) -> dict[str, float]:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share <= 100 for share in shares) or abs(sum(shares) - 100) > 1e-6:
        raise UserError(f"--split {text!r:.40}: must be the percentages of train,val,test, such as 80,10,10")
    if not shares[0]:
        raise UserError(f"--split {text!r:.40}: nothing is left to train on")
    return dict(zip(("train", "val", "test"), shares, strict=True))


def _split_files(folder: Path) -> dict[str, Path]:
    """train, val, test -> file, in that order, as far as the folder has them; train it must have."""
    try:
        candidates = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    files: dict[str, Path] = {}
    for path in candidates:
        name = SPLIT_OF_NAME.get(path.stem.lower())
        if name in files:
            raise UserError(f"{folder}: both {files[name].name} and {path.name} are {name}, keep one of them")
        if name:
            files[name] = path
    if "train" not in files:
        there = ", ".join(path.name for path in candidates[:8]) or "no file of pairs"
        raise UserError(f"{folder}: no train.jsonl (or {' '.join(list(READERS)[1:])}), there is {there}; "
                        "a single file can be given to --data itself")
    return {name: files[name] for name in ("train", "val", "test") if name in files}


def _cut_out(path: Path, pairs: list[Pair], missing: dict[str, float], seed: int) -> dict[str, list[Pair]]:
    """`pairs` parted into train and the missing splits, whole prompts at a time. A split that its share would
    leave empty takes the nearest prompt, so that a handful of rows is enough."""
    prompts = {pair.prompt for pair in pairs}
    if len(prompts) <= len(missing):
        wanted = " + ".join(["train", *missing])
        raise UserError(f"{path}: too few different prompts ({len(prompts)}) for {wanted}: "
                        "add rows or change --split")
    digests = {prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest() for prompt in prompts}
    ordered = sorted(prompts, key=digests.__getitem__)
    points = np.sort([int.from_bytes(digest[:6], "big") / 256**6 for digest in digests.values()])  # in [0, 1)
    split_of_prompt, begin, share = dict.fromkeys(prompts, "train"), 0, 0.0
    for left, name in zip(range(len(missing), 0, -1), reversed(missing), strict=True):  # test first
        share += missing[name] / 100
        end = int(np.searchsorted(points, share))
        end = min(max(end, begin + 1), len(ordered) - left)  # one prompt for each of the splits still to come
        split_of_prompt |= dict.fromkeys(ordered[begin:end], name)
        begin = end
    parts: dict[str, list[Pair]] = {name: [] for name in ("train", *missing)}
    for pair in pairs:
        parts[split_of_prompt[pair.prompt]].append(pair)
    return parts


def _overlap_notes(splits: dict[str, list[Pair]]) -> list[str]:
    prompts = {name: {pair.prompt for pair in pairs} for name, pairs in splits.items()}
    shared = {(a, b): len(prompts[a] & prompts[b]) for a, b in combinations(splits, 2)}
    return [f"{b}: {count:,} of its {len(prompts[b]):,} different prompts also stand in {a}"
            for (a, b), count in shared.items() if count]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts: nothing is added, cut or padded, whatever the tokenizer's own settings, and a
    special token's name in a text (`<|endoftext|>`) is text like any other."""
    plain = copy.deepcopy(tokenizer)
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    with tokenizer_faults("the tokenizer fails on one of the texts"):
        return [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]


def encode(pairs: list[Pair], tokenizer: Tokenizer, eos_id: int,
           max_length: int) -> tuple[list[Example], int]:
    """The pairs as tokens, and how many prompts lost their beginning to keep rows within `max_length`.

    Between prompt and completion stands one space, unless the prompt ends in white space; it belongs to the
    completion, since GPT-2's tokens carry their space. A pair is left out if its completion and end-of-text
    leave no room for one token of the prompt, or if either text has no tokens; length_report counts them.
    Raises UserError if no pair is left.
    """
    if max_length < 3:
        raise UserError(f"--max-length {max_length}: must be 3 or more: prompt, completion and end-of-text")
    spaces = ["" if pair.prompt[-1].isspace() else " " for pair in pairs]
    completions = [space + pair.completion for space, pair in zip(spaces, pairs, strict=True)]
    tokens = tokenize(tokenizer, [pair.prompt for pair in pairs] + completions)
    examples, cut = [], 0
    for pair, prompt, completion in zip(pairs, tokens[: len(pairs)], tokens[len(pairs) :], strict=True):
        room = max_length - len(completion) - 1
        if room < 1 or not prompt or not completion:
            continue
        cut += len(prompt) > room
        prompt = prompt[-room:]
        ids = prompt + completion + [eos_id]
        examples.append(Example(ids, ((len(prompt), len(ids)),), pair))
    if pairs and not examples:
        raise UserError(f"{pairs[0].where} and every other row: no room in {max_length} tokens for completion"
                        " and a token of the prompt, raise --max-length")
    return examples, cut


def length_report(name: str, pairs: list[Pair], examples: list[Example], cut: int, eos_id: int) -> str:
    """One line on a split: rows, their lengths, how many end in end-of-text, and what `encode` left out."""
    if not examples:
        return f"{name}: no rows"
    lengths = [len(example.ids) for example in examples]
    median, most, longest = np.percentile(lengths, [50, 95, 100], method="inverted_cdf")
    ended = sum(example.ids[-1] == eos_id for example in examples) / len(examples)
    line = (f"{name}: {len(examples):,} rows, tokens median {median} / 95 % {most} / max {longest}, "
            f"{ended:.0%} end in end-of-text, prompts cut: {cut:,}")
    if len(examples) < len(pairs):
        kept = {id(example.pair) for example in examples}
        first = next(pair.where for pair in pairs if id(pair) not in kept)
        line += f", dropped for a completion that does not fit: {len(pairs) - len(examples):,}, first {first}"
    return line


def file_batches(examples: list[Example], batch_size: int) -> list[list[Example]]:
    """The rows in their file's order, for comparisons with other code on the same batches."""
    return [examples[at : at + batch_size] for at in range(0, len(examples), batch_size)]


def batches(examples: list[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """One epoch: every example once, in random batches of like length, the same for the same seed and epoch.

    Random pools of POOL_BATCHES batches (fewer if that makes fewer than four pools, so that a row's company
    changes) are sorted by length and cut; then the batches are shuffled. One batch may be smaller.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")
    generator = random.Random(f"{seed} {epoch}")
    shuffled = generator.sample(examples, len(examples))
    pool = batch_size * max(1, min(POOL_BATCHES, len(examples) // batch_size // 4))
    cut = []
    for begin in range(0, len(shuffled), pool):
        rows = sorted(shuffled[begin : begin + pool], key=lambda example: len(example.ids))
        cut += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    generator.shuffle(cut)
    return cut


def load_examples(options: DataOptions, seed: int, tokenizer: Tokenizer, eos_id: int, room: int,
                  limits: dict[str, int | None]) -> tuple[dict[str, list[Example]], list[str]]:
    """The splits named in `limits` as tokens, at most so many rows of each, and the report to print.

    A row takes at most `room` of the model's positions, or --max-length if that is less. Raises UserError.
    """
    pairs = read_pairs(options, seed)
    examples, lines = {}, list(pairs.notes)
    for name, limit in limits.items():
        some = getattr(pairs, name)[:limit]
        examples[name], cut = encode(some, tokenizer, eos_id, min(options.max_length or room, room))
        lines.append(length_report(name, some, examples[name], cut, eos_id))
    return examples, lines


def read_text(path: str | Path) -> str:
    """A text file in UTF-8. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
