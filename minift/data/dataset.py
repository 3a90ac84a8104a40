"""The data of a run: its options, the rows of its three splits, the report on them, and batches."""

import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minift.data.layouts import AnyLayout, PairOptions, choose_layout
from minift.data.pairs import Pair, first_fields, read_file
from minift.data.readers import FileFormat
from minift.data.splits import cut_out, find_split_files, overlap_notes, parse_split
from minift.data.templates import parse_template, used_fields
from minift.data.tokens import Counts, Example, encode
from minift.errors import UserError
from minift.options import option

# Rows of a batch have similar lengths. On SAMSum in batches of 8, filling all rows of a batch up to the longest one
# would add 3 % of tokens with pools of 20 batches (10: 6 %, 50: 1 %, without pools: 36 %).
POOL_BATCHES = 20


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
    skip_bad: bool = option(False, "leave out and count malformed rows, instead of stopping at the first")
    max_length: int | None = option(None, "tokens of a row at most: prompt, completion and end-of-text "
                                          "(default: as many as the model has positions for)")
    rows: int | None = option(None, "train on the first so many usable training rows only")

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

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
    notes: list[str]


# ---- files -> pairs


def read_pairs(options: DataOptions, seed: int) -> Pairs:
    """The pairs of a file or folder in three splits; a split whose percentage is 0 is empty.

    A split without a file is cut out of the training file. Raises UserError for wrong options and files.
    """
    if not options.data:
        raise UserError("no data: give --data a file, or a folder with train, val and test")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows {options.rows}: must be 1 or more")
    shares = parse_split(options.split)

    path = Path(options.data)
    files, unused = find_split_files(path) if os.path.isdir(path) else ({"train": path}, [])
    splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    notes: list[str] = []
    for name, file in files.items():
        splits[name], file_notes = read_file(file, options.prompt_field, options.completion_field,
                                             options.template, options.skip_bad, options.turns,
                                             options.separator, options.format)
        notes += file_notes
    notes += unused

    missing = {name: share for name, share in shares.items() if name not in files and share}
    if missing:
        parts, note = cut_out(files["train"], splits["train"], missing, seed)
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


def read_layout(options: DataOptions) -> AnyLayout:
    """The layout of the flags, else that of the first training row. Raises UserError."""
    if options.template is not None or options.prompt_field:
        # an imaginary row with just these fields: a template is applied without any file
        names = used_fields(parse_template(options.template)) if options.template else [options.prompt_field]
        fields = dict.fromkeys(names, "")
        return choose_layout(Path("--template"), fields, options.pair_options, with_completion=False)
    if not options.data:
        raise UserError("no data: give --template or --prompt-field")
    path = Path(options.data)
    file = find_split_files(path)[0]["train"] if os.path.isdir(path) else path
    return choose_layout(file, first_fields(file, options.format), options.pair_options)


# ---- the report


def length_report(name: str, pairs: list[Pair], examples: list[Example], counts: Counts, eos_id: int) -> str:
    """A line on a split: the number of rows, their lengths, how many end in end-of-text, and how many are left out."""
    if not examples:
        return f"{name}: no rows"
    lengths = [len(example.ids) for example in examples]
    median, most, longest = np.percentile(lengths, [50, 95, 100], method="inverted_cdf")
    ended = sum(example.ids[-1] == eos_id for example in examples) / len(examples)
    line = (f"{name}: {len(examples):,} rows, tokens median {median} / 95 % {most} / max {longest}, "
            f"{ended:.0%} end in end-of-text, prompts cut: {counts.shortened:,}")
    texts = sum(not pair.prompt for pair in pairs)
    if texts:
        line += f", cut from {texts:,} texts, each begins after an end-of-text"
    kept = {example.pair.where for example in examples}
    dropped = [pair for pair in pairs if pair.where not in kept]
    if dropped:
        line += f", dropped for a completion that does not fit: {len(dropped):,}, first {dropped[0].where}"
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
                  limits: dict[str, int | None]) -> tuple[dict[str, list[Example]], list[str]]:
    """The rows of each split in `limits` (split -> the most rows of it, None: all), and the lines of the report.

    A row has at most `room` tokens, or --max-length if that is less. Raises UserError.
    """
    if eos_id is None:
        raise UserError("no file of the base names its end-of-text, which every row needs: put eos_token_id "
                        "into its generation_config.json")
    pairs = read_pairs(options, seed)
    examples, lines, counts = {}, list(pairs.notes), []
    max_length = min(options.max_length or room, room)
    for name, limit in limits.items():
        some = getattr(pairs, name)[:limit]
        examples[name], count = encode(some, tokenizer, eos_id, max_length, options.separator,
                                       options.control_tokens)
        examples[name] = examples[name][:limit]  # again, as a text alone becomes several rows
        lines.append(length_report(name, some, examples[name], count, eos_id))
        counts.append(count)
    return examples, lines + _text_report(counts, sum(map(len, examples.values())), options)


def read_text(path: str | Path) -> str:
    """A text file in UTF-8. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


# ---- batches


def file_batches(examples: list[Example], batch_size: int) -> list[list[Example]]:
    """Batches in the file's order, to compare with other code on the same batches."""
    return [examples[at : at + batch_size] for at in range(0, len(examples), batch_size)]


def batches(examples: list[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """One epoch: every row once, in random batches of rows with similar lengths; fixed by seed and epoch.

    The shuffled rows are cut into pools, each pool is sorted by length and cut into batches, and the batches are
    shuffled. One batch may be smaller than the others.
    """
    generator = random.Random(f"{seed} {epoch}")
    shuffled = generator.sample(examples, len(examples))
    # at least four pools: a single one would put the same rows into the same batch in every epoch
    pool = batch_size * max(1, min(POOL_BATCHES, len(examples) // batch_size // 4))
    cut = []
    for begin in range(0, len(shuffled), pool):
        rows = sorted(shuffled[begin : begin + pool], key=lambda example: len(example.ids))
        cut += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    generator.shuffle(cut)
    return cut
