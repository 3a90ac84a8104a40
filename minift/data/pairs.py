"""Records -> pairs of prompt and completion: known layouts, the user's template, chats, text alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.data.chats import (
    CHAT_FIELDS,
    WEIGHT_FIELDS,
    is_learned,
    is_turns,
    read_chat,
    read_chat_prompt,
)
from minift.data.readers import FileFormat, read_records
from minift.data.records import field_text, list_names
from minift.data.templates import Part, fill, needed_fields, parse_template, rename_fields, used_fields
from minift.errors import UserError

# Prompt template and completion field of the layouts that are known by their fields; the first that fits a
# file's first row is taken.
KNOWN_PAIRS = (
    ("{prompt}", "completion"),
    ("{prompt}", "response"),
    ("{instruction}{?input:\n\nInput:\n{input}}\n\nAnswer:", "output"),
    ("{instruction}{?input:\n\nInput:\n{input}}{?context:\n\nInput:\n{context}}\n\nAnswer:", "response"),
    ("{dialogue}\n\nSummary:", "summary"),
    ("{document}\n\nSummary:", "summary"),
    ("{article}\n\nSummary:", "highlights"),
    ("{mr}\n\nText:", "ref"),
    ("{meaning_representation}\n\nText:", "human_reference"),
    ("{?context:{context}\n\n}{question}\n\nAnswer:", "answer"),
    ("{?context:{context}\n\n}{question}\n\nAnswer:", "response"),
    ("{query}\n\nAnswer:", "response"),
    ("{context}", "completion"),
    ("{input}", "output"),
)
TEXT_FIELD = "text"
PLAIN_FORMAT = FileFormat()
# Beside one of these, `text` is more likely a prompt: the user has to say it.
TARGET_FIELDS = ("label", "labels", "target", "summary", "completion", "response", "answer", "output")


@dataclass(frozen=True)
class Pair:
    """A prompt, its completion, and their place: "train.jsonl:12".

    Both are as the file has them, white space included. The prompt of a text alone is "". In a chat,
    `learned` are the ranges of characters of the prompt that are learned too: earlier answers.
    """

    prompt: str
    completion: str
    where: str
    learned: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """How a record becomes a pair: the parts of the prompt and the completion's field."""

    prompt: tuple[Part, ...]
    completion: str
    template: str  # as the user or KNOWN_PAIRS wrote it

    @property
    def used(self) -> list[str]:
        return [*used_fields(self.prompt), self.completion]

    def prompt_of(self, fields: dict[str, Any]) -> str:
        return fill(self.prompt, fields)

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        """The prompt is "" if all its fields are blank. Raises ValueError for a bad row."""
        return Pair(self.prompt_of(fields), field_text(fields, self.completion), where)

    def __str__(self) -> str:
        names = ", ".join(used_fields(self.prompt))
        return f"fields {names} -> {self.completion}, template {self.template!r}"


@dataclass(frozen=True)
class ChatLayout:
    names: tuple[str, ...]  # of the fields with the turns
    turns: str  # "all" answers are learned, or the "last"
    join: str

    @property
    def used(self) -> list[str]:
        return list(self.names)

    def prompt_of(self, fields: dict[str, Any]) -> str:
        return read_chat_prompt(fields, self.names, self.join)

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        chat = read_chat(fields, self.names, self.turns, self.join)
        return Pair(chat.prompt, chat.completion, where, chat.learned)

    def __str__(self) -> str:
        turns = f"fields {', '.join(self.names)}" if len(self.names) > 1 else f"field {self.names[0]}"
        if self.turns == "all":
            return f"{turns}, every answer of the assistant is learned (--turns last: the last one)"
        return f"{turns}, the last answer of the assistant is learned"


@dataclass(frozen=True)
class TextLayout:
    name: str

    @property
    def used(self) -> list[str]:
        return [self.name]

    def prompt_of(self, fields: dict[str, Any]) -> str:
        return field_text(fields, self.name)  # to be continued

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        return Pair("", field_text(fields, self.name), where)

    def __str__(self) -> str:
        return f"field {self.name} alone, without prompts: every token is learned"


@dataclass(frozen=True)
class PairOptions:
    """The flags that say how the fields of a record become a pair."""

    prompt_field: str | None = None
    completion_field: str | None = None
    template: str | None = None
    turns: str = "all"
    join: str = " "


AnyLayout = Layout | ChatLayout | TextLayout


def _known_layout(fields: dict[str, Any], with_completion: bool) -> Layout | None:
    """The first known layout that fits; names may be written Prompt or PROMPT."""
    actual = {name.strip().lower(): name for name in reversed(fields)} | {name: name for name in fields}
    for template, completion in KNOWN_PAIRS:
        parts = parse_template(template)
        needed = [*needed_fields(parts), completion] if with_completion else needed_fields(parts)
        if all(name in actual for name in needed):
            return Layout(rename_fields(parts, actual), actual.get(completion, completion), template)
    return None


def _chat_fields(fields: dict[str, Any]) -> tuple[str, ...]:
    if is_turns(fields.get("prompt")) and is_turns(fields.get("completion")):
        return ("prompt", "completion")
    return tuple(name for name in CHAT_FIELDS if name in fields)[:1]


def choose_layout(path: Path, fields: dict[str, Any], options: PairOptions,
                  with_completion: bool = True) -> AnyLayout:
    """The layout that the flags say, and where they are silent, the first known one that fits the first row.
    `with_completion` False: the rows need no completions. Raises UserError if there is no layout, or the
    flags name fields that are not there."""
    prompt_field, completion, template = options.prompt_field, options.completion_field, options.template
    known = _known_layout(fields, with_completion)
    if prompt_field is None and completion is None and template is None:
        names = _chat_fields(fields)
        if names == ("prompt", "completion"):
            return ChatLayout(names, "last", options.join)  # turns of the prompt are no answers to learn
        if names and known is None:
            return ChatLayout(names, options.turns, options.join)
        if known is None and TEXT_FIELD in fields and not any(name in fields for name in TARGET_FIELDS):
            return TextLayout(TEXT_FIELD)
    if prompt_field == "" and completion in fields and template is None:
        return TextLayout(completion)
    if prompt_field is not None and template is not None:
        if prompt_field not in used_fields(parse_template(template)):
            raise UserError(f"--template {template!r:.80} does not use --prompt-field {prompt_field!r:.40}, "
                            "drop one")
    completion = completion or (known.completion if known else None)
    if template is not None:
        parts = parse_template(template)
    elif prompt_field is not None:
        parts, template = (Part(prompt_field, True),), "{" + prompt_field + "}"
    elif known is not None:
        parts, template = known.prompt, known.template
    if not with_completion and completion is None:
        completion = "completion"
    if completion is None or template is None:
        raise UserError(
            f"{path}: which of its fields {list_names(fields)} are prompt and completion? Say it with "
            "--prompt-field (or --template) and --completion-field; --prompt-field '' learns the "
            "completion's field alone, and --columns names the columns of a table without a header")
    layout = Layout(parts, completion, template)
    _check_layout(path, fields, layout, with_completion)
    return layout


def _check_layout(path: Path, fields: dict[str, Any], layout: Layout, with_completion: bool) -> None:
    remedy = "change --prompt-field, --completion-field or --template"
    needed = needed_fields(layout.prompt)
    for name in [*needed, layout.completion] if with_completion else needed:
        if name not in fields:
            raise UserError(f"{path}: no field {name!r:.40}, there are {list_names(fields)}: {remedy}")
    used = used_fields(layout.prompt)
    if not used:
        raise UserError(f"{path}: the prompt's template {layout.template!r:.80} uses no field: {remedy}")
    if layout.completion in used:
        raise UserError(f"{path}: the prompt's template {layout.template!r:.80} holds the completion's field "
                        f"{layout.completion!r:.40}: {remedy}")


def read_file(path: Path, prompt_field: str | None = None, completion_field: str | None = None,
              template: str | None = None, skip_bad: bool = False, turns: str = "all", join: str = " ",
              format: FileFormat = PLAIN_FORMAT) -> tuple[list[Pair], list[str]]:
    """The usable pairs of a file in their order, and notes: the layout, rows that were dropped, duplicates.

    Raises UserError for a file that cannot be read, a layout that is not known, no usable row, and, unless
    `skip_bad`, the first malformed row.
    """
    options = PairOptions(prompt_field, completion_field, template, turns, join)
    pairs, bad, layout = [], [], None
    dropped: dict[str, list[str]] = {}  # reason -> places
    records, dialect = read_records(path, format)
    for record in records:
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
            bad.append(f"{record.where}: {problem}")
        elif reason:
            dropped.setdefault(reason, []).append(record.where)
        else:
            pairs.append(pair)
    lost = [f"malformed rows skipped: {len(bad):,}, {'; '.join(bad[:3])}"] if bad else []
    lost += [f"rows dropped for {reason}: {len(places):,}, first {places[0]}"
             for reason, places in sorted(dropped.items(), reverse=True)]
    if not pairs:
        raise UserError(f"{path}: no usable row, {'; '.join(lost) or 'the file holds none'}")
    notes = [f"usable rows: {len(pairs):,}, {layout}" + (f", {dialect}" if dialect else ""), *lost]
    repeats = len(pairs) - len({(pair.prompt, pair.completion) for pair in pairs})
    if repeats:
        notes.append(f"rows that repeat an earlier one exactly, kept: {repeats:,}")
    return pairs, [f"{path.name}: {note}" for note in notes]


def _read_pair(layout: AnyLayout, fields: dict[str, Any], where: str) -> tuple[Pair, str]:
    """The pair of a row, and the reason to drop it, or ""."""
    pair = layout.read(fields, where)
    weights = {name: fields[name] for name in WEIGHT_FIELDS if name in fields}
    if weights and not is_learned({name: weights[name] for name in weights if name not in layout.used}):
        return pair, "a weight of 0"
    if not pair.prompt.strip() and not isinstance(layout, TextLayout):
        return pair, "an empty prompt"
    return pair, "" if pair.completion.strip() else "an empty completion"


@dataclass(frozen=True)
class Prompt:
    """A prompt that waits for its completion, and the row that it was made of."""

    text: str
    fields: dict[str, Any]
    where: str


def read_prompts(path: Path, options: PairOptions, format: FileFormat = PLAIN_FORMAT) -> Iterator[Prompt]:
    """The prompts of a file whose rows need no completions, in their order. Raises UserError at the first row
    that gives none."""
    layout = None
    records, _ = read_records(path, format)
    for record in records:
        problem = record.problem
        if not problem:
            layout = layout or choose_layout(path, record.fields, options, with_completion=False)
            try:
                text = layout.prompt_of(record.fields)
                problem = "" if text.strip() else "the prompt is empty"
            except ValueError as error:
                problem = str(error)
        if problem:
            raise UserError(f"{path.with_name(record.where)}: {problem}: mend or remove the row")
        yield Prompt(text, record.fields, record.where)
