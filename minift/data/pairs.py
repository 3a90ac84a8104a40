"""Files -> pairs of prompt and completion, with notes on the rows that were dropped, and the reasons."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minift.data.chats import WEIGHT_FIELDS, is_learned
from minift.data.layouts import AnyLayout, Pair, PairOptions, Ranges, TextLayout, choose_layout
from minift.data.pair_file import NewPairFile, StoredPairs
from minift.data.progress import progress
from minift.data.readers import FileFormat, read_records
from minift.errors import UserError

PLAIN_FORMAT = FileFormat()


def read_file(path: Path, options: PairOptions, format: FileFormat, skip_bad: bool,
              store: NewPairFile) -> tuple[StoredPairs, list[str]]:
    """The usable pairs of a file in their order, appended to `store`, and notes: the layout, rows that were dropped,
    duplicates.

    Raises UserError for a file that cannot be read, a layout that is not known, a file without a usable row, and,
    unless `skip_bad`, for the first malformed row.
    """
    first = len(store)
    bad = Lost()
    dropped: dict[str, Lost] = {}  # reason -> rows
    layout = None
    records, dialect = read_records(path, format)
    for record in progress(records, "reading rows"):
        problem = record.problem
        if not problem:
            layout = layout or choose_layout(path, record.fields, options)
            try:
                pair, reason = _read_pair(layout, record.fields, record.where)
            except ValueError as error:
                problem = str(error)
        if problem and not skip_bad:
            raise UserError(f"{path.with_name(record.where)}: {problem} (--skip-bad leaves such rows out)")
        if problem:
            bad.add(f"{record.where}: {problem}")
        elif reason:
            dropped.setdefault(reason, Lost()).add(record.where)
        else:
            store.append(pair)

    pairs = StoredPairs(store, range(first, len(store)))
    lost = _lost_rows(bad, dropped)
    if not pairs:
        raise UserError(f"{path}: no usable row, {'; '.join(lost) or 'the file holds none'}")
    usable = f"usable rows: {len(pairs):,}, {layout}"
    if dialect:
        usable += f", {dialect}"
    notes = [usable, *lost]
    if repeats := pairs.count_repeats():
        notes.append(f"rows that repeat an earlier one exactly, kept: {repeats:,}")
    return pairs, [f"{path.name}: {note}" for note in notes]


@dataclass
class Lost:
    """Rows that were left out: their number and the first three."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, row: str) -> None:
        self.count += 1
        if self.count <= 3:
            self.first.append(row)


def _lost_rows(bad: Lost, dropped: dict[str, Lost]) -> list[str]:
    """A line on the malformed rows, and one on each reason to drop rows."""
    lines = []
    if bad.count:
        lines.append(f"malformed rows skipped: {bad.count:,}, {'; '.join(bad.first)}")
    for reason, rows in sorted(dropped.items(), reverse=True, key=lambda item: item[0]):
        lines.append(f"rows dropped for {reason}: {rows.count:,}, first {rows.first[0]}")
    return lines


def _read_pair(layout: AnyLayout, fields: dict[str, Any], where: str) -> tuple[Pair, str]:
    """The pair of a row, and the reason to drop it, or "". Raises ValueError for a malformed row."""
    pair = layout.read(fields, where)
    # a field that the prompt or the completion uses is no weight, even if it is called so
    weights = {name: fields[name] for name in WEIGHT_FIELDS if name in fields and name not in layout.used}
    if not is_learned(weights):
        return pair, "a weight of 0"
    if not pair.prompt.strip() and not isinstance(layout, TextLayout):
        return pair, "an empty prompt"
    return pair, "" if pair.completion.strip() else "an empty completion"


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row without a completion."""

    text: str
    fields: dict[str, Any]  # of the row, all of them
    where: str
    learned: Ranges = field(default=(), compare=False)  # earlier answers of a chat, as in Pair


def read_prompts(path: Path, options: PairOptions, format: FileFormat = PLAIN_FORMAT,
                 layout: AnyLayout | None = None) -> Iterator[Prompt]:
    """The prompts of a file whose rows need no completions, in their order.

    Without `layout`, it is chosen by the first row. Raises UserError at the first row that has no prompt.
    """
    records, _ = read_records(path, format)
    for record in records:
        problem = record.problem
        if not problem:
            layout = layout or choose_layout(path, record.fields, options, with_completion=False)
            try:
                text, learned = layout.prompt_of(record.fields)
                problem = "" if text.strip() else "the prompt is empty"
            except ValueError as error:
                problem = str(error)
        if problem:
            raise UserError(f"{path.with_name(record.where)}: {problem}: mend or remove the row")
        yield Prompt(text, record.fields, record.where, learned)


def first_fields(path: Path, format: FileFormat) -> dict[str, Any]:
    """The fields of the first row that can be read. Raises UserError if there is none."""
    for record in read_records(path, format)[0]:
        if not record.problem:
            return record.fields
    raise UserError(f"{path}: no usable row, the file holds none")
