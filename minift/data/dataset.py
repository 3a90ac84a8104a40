"""The data of a run: its options, the rows of its three splits, the report on them, and batches."""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from minift.data import quality, row_cache
from minift.data.layouts import AnyLayout, Pair, PairOptions, choose_layout
from minift.data.pair_file import NewPairFile, StoredPairs
from minift.data.pairs import first_fields, read_file
from minift.data.progress import progress
from minift.data.quality import Finding, Quality
from minift.data.readers import FileFormat
from minift.data.row_cache import Loaded
from minift.data.row_store import Examples, RowWriter
from minift.data.splits import cut_out, find_split_files, overlap_notes, parse_split
from minift.data.templates import parse_template, used_fields
from minift.data.token_process import AnyTokenizer, OtherProcess, SameProcess
from minift.data.tokens import Counts, Encoder
from minift.errors import UserError
from minift.model.packing import Row
from minift.options import option

# Rows of a batch have similar lengths. On SAMSum in batches of 8, filling all rows of a batch up to the longest one
# would add 3 % of tokens with pools of 20 batches (10: 6 %, 50: 1 %, without pools: 36 %).
POOL_BATCHES = 20
CHUNK = 2000  # pairs that are in memory at a time while they are tokenized
MANY_PAIRS = 10_000  # from this number on a second process tokenizes, which takes a moment to start


@dataclass(frozen=True)
class DataOptions:
    data: str | None = option(None, "rows to learn: a file of JSON, separated values or text, or a folder of "
                                    "train, val and test")
    prompt_field: str | None = option(None, "the prompt's field (default: known names are recognised)")
    completion_field: str | None = option(None, "the completion's field (default: likewise)")
    template: str | None = option(None, "the prompt, with fields in braces: '{dialogue}\\n\\nSummary:'; "
                                        "{?context: ...} is used where context is not blank; \\n is a line "
                                        "end, {{ and }} are braces")
    join: str = option(" ", "text between prompt and completion where neither has white space there; '' for "
                            "none (default one space)")
    turns: str = option("all", "answers of a chat that are learned", choices=("all", "last"))
    control_tokens: str = option("tokens", "how to read names of control tokens (<|endoftext|>) in the texts",
                                 choices=("tokens", "text"))
    encoding: str = option("utf-8", "encoding of the files, such as cp1252")
    delimiter: str | None = option(None, "separator of a table: ',' ';' '|' or tab (default: found out)")
    columns: str | None = option(None, "names of a table's columns, if its first row does not give them")
    split: str = option("80,10,10", "percent of train, val and test, as far as no file gives them")
    split_seed: int | None = option(None, "seed of that split (default: --seed)", least=0)
    skip_bad: bool = option(False, "leave out and count malformed rows, instead of stopping at the first")
    max_length: int | None = option(None, "tokens of a row at most: prompt, completion and end-of-text "
                                          "(default: as many as the model has positions for)")
    rows: int | None = option(None, "train on the first so many usable training rows only")
    cache: bool = option(True, "keep the tokens of large files in ~/.cache/minift for the next start")

    @property
    def separator(self) -> str:
        return self.join.replace("\\n", "\n")  # a shell passes \n on as two characters

    @property
    def format(self) -> FileFormat:
        return FileFormat(self.encoding, self.delimiter, self.columns)

    @property
    def pair_options(self) -> PairOptions:
        return PairOptions(self.prompt_field, self.completion_field, self.template, self.turns, self.separator)


@dataclass(frozen=True)
class Pairs:
    """The three splits, each in its file's order, and notes to print before training, one line each."""

    train: StoredPairs
    val: StoredPairs
    test: StoredPairs
    notes: list[str]


# ---- files -> pairs


def read_pairs(options: DataOptions, seed: int, folder: Path | None = None) -> Pairs:
    """The pairs of a file or folder in three splits; a split whose percentage is 0 is empty.

    A split without a file is cut out of the training file. `folder`: of the texts, see NewPairFile. Raises
    UserError for wrong options and files.
    """
    if not options.data:
        raise UserError("no data: give --data a file, or a folder with train, val and test")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows {options.rows}: must be 1 or more")
    shares = parse_split(options.split)
    if options.split_seed is not None:
        seed = options.split_seed

    files, unused = find_files(options.data)
    store = NewPairFile(seed, folder)
    splits = {name: StoredPairs(store, []) for name in ("train", "val", "test")}
    notes: list[str] = []
    for name, file in files.items():
        splits[name], file_notes = read_file(file, options.pair_options, options.format, options.skip_bad, store)
        notes += file_notes
    notes += unused

    missing = {name: share for name, share in shares.items() if name not in files and share}
    if missing:
        parts, note = cut_out(files["train"], splits["train"], missing)
        splits |= parts
        notes.append(note)
    left_out = [name for name, share in shares.items() if name not in files and not share]
    if left_out:
        notes.append(f"no rows for {' and '.join(left_out)} (--split {options.split})")

    # after the split, so that val and test are the same for any --rows
    if options.rows is not None:
        found = len(splits["train"])
        splits["train"] = splits["train"][: options.rows]
        notes.append(f"train: the first {len(splits['train']):,} of {found:,} rows (--rows)")
    return Pairs(**splits, notes=notes + overlap_notes(splits))


def find_files(data: str) -> tuple[dict[str, Path], list[str]]:
    """The file of each split of --data, and a note on files that are not used. Raises UserError."""
    path = Path(data)
    return find_split_files(path) if os.path.isdir(path) else ({"train": path}, [])


def read_layout(options: DataOptions) -> AnyLayout:
    """The layout of the flags, else that of the first training row. Raises UserError."""
    if options.template is not None or options.prompt_field:
        # an imaginary row with just these fields: a template is applied without any file
        names = used_fields(parse_template(options.template)) if options.template else [options.prompt_field]
        fields = dict.fromkeys(names, "")
        return choose_layout(Path("--template"), fields, options.pair_options, with_completion=False)
    if not options.data:
        raise UserError("no data: give --template or --prompt-field")
    file = find_files(options.data)[0]["train"]
    return choose_layout(file, first_fields(file, options.format), options.pair_options)


# ---- the report


def length_report(name: str, examples: Examples, counts: Counts, eos_id: int) -> str:
    """A line on a split: the number of rows, their lengths, how many end in end-of-text, and how many are left out."""
    if not examples:
        return f"{name}: no rows"
    median, most, longest = np.percentile(examples.lengths, [50, 95, 100], method="inverted_cdf")
    ended = np.mean(examples.last_tokens == eos_id)
    line = (f"{name}: {len(examples):,} rows, tokens median {median} / 95 % {most} / max {longest}, "
            f"{ended:.0%} end in end-of-text, prompts cut: {counts.shortened:,}")
    if counts.texts:
        line += f", cut from {counts.texts:,} texts, each begins after an end-of-text"
    if counts.dropped:
        line += f", dropped for a completion that does not fit: {counts.dropped:,}, first {counts.first_dropped}"
    return line


def _text_report(counts: list[Counts], rows: int, options: DataOptions) -> list[str]:
    """A line on the rows with `join` between their texts, and a line on the control tokens in the texts."""
    lines = []
    joined = sum(each.joined for each in counts)
    if joined:
        join = "one space" if options.separator == " " else repr(options.separator)
        lines.append(f"{join} put between prompt and completion: {joined:,} of {rows:,} rows, where neither "
                     "has white space there (--join)")
    found = sum((each.control_tokens for each in counts), Counter())
    if found:
        names = ", ".join(f"{name} {count:,}" for name, count in found.most_common(8))
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        lines.append(f"control tokens in the texts: {names}{more} (--control-tokens text reads them as text)")
    return lines


def load_examples(options: DataOptions, seed: int, tokenizer: Tokenizer, eos_id: int | None, room: int,
                  limits: dict[str, int | None]) -> tuple[dict[str, Examples], list[str], quality.Facts]:
    """The rows of each split in `limits` (split -> the most rows of it, None: all), the lines of the report, and what
    was found on the quality of the training rows, if they are in `limits`.

    A row has at most `room` tokens, or --max-length if that is less. Raises UserError.
    """
    if eos_id is None:
        raise UserError("no file of the base names its end-of-text, which every row needs: put eos_token_id "
                        "into its generation_config.json")
    max_length = min(options.max_length or room, room)
    encoder = Encoder(tokenizer, eos_id, max_length, options.separator, options.control_tokens)

    def make(folder: Path | None) -> Loaded:
        return make_rows(options, seed, encoder, limits, folder)

    files, unused = find_files(options.data) if options.data else ({}, [])
    # without the training rows most of the time goes into reading, which a cache of tokens does not save
    if options.cache and "train" in limits and row_cache.is_large(list(files.values())):
        names = {name: path.name for name, path in files.items()}
        settings = [asdict(options), seed, eos_id, max_length, limits, names, unused, tokenizer.to_str(),
                    tokenizers.__version__]
        loaded, note = row_cache.load_or_make(row_cache.find_key(list(files.values()), settings), make)
        notes = [note]
    else:
        loaded, notes = make(None), []
    rows = {name: Examples(loaded.store, numbers) for name, numbers in loaded.splits.items()}
    return rows, loaded.lines + notes, loaded.quality


def make_rows(options: DataOptions, seed: int, encoder: Encoder, limits: dict[str, int | None],
              folder: Path | None) -> Loaded:
    """The rows of the splits, from the files. Raises UserError."""
    pairs = read_pairs(options, seed, folder)
    chosen = {name: getattr(pairs, name)[:limit] for name, limit in limits.items()}
    writer = RowWriter(folder)
    counts, splits, seen = {}, {}, Quality()
    kind = OtherProcess if sum(map(len, chosen.values())) >= MANY_PAIRS else SameProcess
    with contextlib.closing(kind(encoder.tokenizer, encoder.control_tokens)) as tokenizer:
        for name, split in chosen.items():
            first = len(writer)
            check = seen if name == "train" else None
            counts[name] = encode_split(name, split, encoder, tokenizer, writer, limits[name], check)
            splits[name] = range(first, len(writer))
    store = writer.finish(pairs.train.file)
    lines = list(pairs.notes)
    for name, numbers in splits.items():
        lines.append(length_report(name, Examples(store, numbers), counts[name], encoder.eos_id))
    findings = check_quality(pairs, seen) if "train" in limits else []
    lines += _text_report(list(counts.values()), len(writer), options) + quality.report(findings)
    return Loaded(store, splits, lines, quality.facts(findings))


def check_quality(pairs: Pairs, seen: Quality) -> list[Finding]:
    """Findings on the training rows, and on prompts of val and test that are nearly in train."""
    overlaps = [seen.near_prompts(name, getattr(pairs, name)) for name in ("val", "test")]
    return seen.findings() + [finding for finding in overlaps if finding is not None]


def encode_split(name: str, pairs: StoredPairs, encoder: Encoder, tokenizer: AnyTokenizer, writer: RowWriter,
                 limit: int | None, check: Quality | None) -> Counts:
    """The pairs of a split as rows in `writer`, at most `limit` of them, and in `check`. Raises UserError if no pair
    fits."""
    counts = Counts()
    first = len(writer)
    for numbers, texts, tokens in one_ahead(pairs, encoder, tokenizer, f"tokenizing {name}"):
        encoder.count_control_tokens(tokens, counts)
        for number, pair, pair_tokens in zip(numbers, texts, tokens, strict=True):
            if check is not None:
                check.add(pair)
            for row in encoder.rows(pair, pair_tokens, counts):
                if limit is not None and len(writer) - first == limit:
                    break  # a text alone becomes several rows
                # a window has a part of the pair's text, which is another pair
                writer.append(name, row, number if row.pair is pair else pairs.file.append(row.pair))
    if pairs and len(writer) == first:
        raise UserError(f"{pairs[0].where} and every other row: no room in {encoder.max_length} tokens for completion"
                        " and a token of the prompt: shorten them, or raise --max-length where the model has more "
                        "positions")
    return counts


def one_ahead(pairs: StoredPairs, encoder: Encoder, tokenizer: AnyTokenizer,
              title: str) -> Iterator[tuple[np.ndarray, list[Pair], list[list[bytes]]]]:
    """The numbers, the texts and the tokens of chunks of pairs. While the caller makes rows of a chunk, the tokenizer
    has the next one."""
    in_work = None  # the numbers and texts of the chunk that the tokenizer has
    for begin in progress(range(0, len(pairs), CHUNK), title, CHUNK):
        chunk = pairs[begin : begin + CHUNK]
        texts = list(chunk)
        finished = (*in_work, tokenizer.receive()) if in_work else None
        tokenizer.send([encoder.pieces(pair) for pair in texts])  # before the yield: both processes then work
        in_work = chunk.numbers, texts
        if finished:
            yield finished
    if in_work:
        yield *in_work, tokenizer.receive()


def read_text(path: str | Path) -> str:
    """A text file in UTF-8. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


# ---- batches


def row_lengths(rows: Sequence[Row]) -> np.ndarray:
    """The number of tokens of each row."""
    return rows.lengths if isinstance(rows, Examples) else np.array([len(row.ids) for row in rows])


def file_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The row numbers of batches in the file's order, to compare with other code on the same batches."""
    numbers = np.arange(len(lengths))
    return [numbers[at : at + batch_size] for at in range(0, len(numbers), batch_size)]


def batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of the batches of an epoch, from the rows' lengths: every row once, in random batches of rows
    with similar lengths; fixed by seed and epoch.

    The shuffled rows are cut into pools, each pool is sorted by length and cut into batches, and the batches are
    shuffled. One batch may be smaller than the others.
    """
    generator = random.Random(f"{seed} {epoch}")
    count = len(lengths)
    shuffled = np.array(generator.sample(range(count), count), dtype=np.int64)
    # at least four pools: a single one would put the same rows into the same batch in every epoch
    pool = batch_size * max(1, min(POOL_BATCHES, count // batch_size // 4))
    cut = []
    for begin in range(0, count, pool):
        rows = shuffled[begin : begin + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    generator.shuffle(cut)
    return cut
