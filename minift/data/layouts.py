"""Fields -> pairs of prompt and completion: known layouts, the user's template, chats, text alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minift.data.chats import (
    CHAT_FIELDS,
    is_turns,
    read_chat,
    read_chat_prompt,
)
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
# Beside one of these, `text` is more likely a prompt: the user has to say it.
TARGET_FIELDS = ("label", "labels", "target", "summary", "completion", "response", "answer", "output")


Ranges = tuple[tuple[int, int], ...]  # of characters, half-open


@dataclass(frozen=True)
class Pair:
    """A prompt, its completion, and their place: "train.jsonl:12".

    Both are as the file has them, white space included. The prompt of a text alone is "". In a chat,
    `learned` are the ranges of characters of the prompt that are learned too: earlier answers.
    """

    prompt: str
    completion: str
    where: str
    learned: Ranges = ()


@dataclass(frozen=True)
class Layout:
    """How a record becomes a pair: the parts of the prompt and the completion's field."""

    prompt: tuple[Part, ...]
    completion: str
    template: str  # as the user or KNOWN_PAIRS wrote it

    @property
    def used(self) -> list[str]:
        return [*used_fields(self.prompt), self.completion]

    @property
    def needed(self) -> list[str]:
        """The fields without which a row has no prompt."""
        return needed_fields(self.prompt)

    def prompt_of(self, fields: dict[str, Any]) -> tuple[str, Ranges]:
        """The prompt of a row that may lack its completion, and the ranges of it that a run would learn too."""
        return fill(self.prompt, fields), ()

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        """The prompt is "" if all its fields are blank. Raises ValueError for a bad row."""
        return Pair(fill(self.prompt, fields), field_text(fields, self.completion), where)

    def __str__(self) -> str:
        names = ", ".join(used_fields(self.prompt))
        return f"fields {names} -> {self.completion}, template {self.template!r}"


@dataclass(frozen=True)
class ChatLayout:
    names: tuple[str, ...]  # of the fields with the turns
    turns: str  # "all" answers are learned, or the "last"
    join: str
    unused: tuple[str, ...] = ()  # fields of the row that say how the chat came about

    @property
    def used(self) -> list[str]:
        return list(self.names)

    @property
    def needed(self) -> list[str]:
        return [self.names[0]]  # turns in a second field are the completion

    def prompt_of(self, fields: dict[str, Any]) -> tuple[str, Ranges]:
        names = tuple(name for name in self.names if name in fields)
        return read_chat_prompt(fields, names or self.names, self.turns, self.join)

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        chat = read_chat(fields, self.names, self.turns, self.join)
        return Pair(chat.prompt, chat.completion, where, chat.learned)

    def __str__(self) -> str:
        turns = f"fields {', '.join(self.names)}" if len(self.names) > 1 else f"field {self.names[0]}"
        unused = f", not used: {', '.join(self.unused)}" if self.unused else ""
        if self.turns == "all":
            return f"{turns}, every answer of the assistant is learned (--turns last: the last one){unused}"
        return f"{turns}, the last answer of the assistant is learned{unused}"


@dataclass(frozen=True)
class TextLayout:
    name: str

    @property
    def used(self) -> list[str]:
        return [self.name]

    @property
    def needed(self) -> list[str]:
        return [self.name]

    def prompt_of(self, fields: dict[str, Any]) -> tuple[str, Ranges]:
        return field_text(fields, self.name), ()  # to be continued

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


def choose_layout(path: Path, fields: dict[str, Any], options: PairOptions,
                  with_completion: bool = True) -> AnyLayout:
    """The layout that the flags say, and where they are silent, the first known one that fits the first row.
    `with_completion` False: the rows need no completions. Raises UserError if there is no layout, or the
    flags name fields that are not there."""
    known = _known_layout(fields, with_completion)
    if options.prompt_field is None and options.completion_field is None and options.template is None:
        layout = _layout_without_flags(fields, options, known, with_completion)
    elif options.prompt_field == "" and options.template is None and options.completion_field in fields:
        return TextLayout(options.completion_field)
    else:
        layout = _layout_of_flags(options, known, with_completion)
    if layout is None:
        raise UserError(
            f"{path}: which of its fields {list_names(fields)} are prompt and completion? Say it with "
            "--prompt-field (or --template) and --completion-field; --prompt-field '' learns the "
            "completion's field alone, and --columns names the columns of a table without a header")
    if isinstance(layout, Layout):
        _check_layout(path, fields, layout, with_completion)
    return layout


def _layout_without_flags(fields: dict[str, Any], options: PairOptions, known: Layout | None,
                          with_completion: bool) -> AnyLayout | None:
    if is_turns(fields.get("prompt")) and (is_turns(fields.get("completion")) or not with_completion):
        # Only the completion is to be learned, whatever answers the prompt holds.
        return ChatLayout(("prompt", "completion"), "last", options.join)
    if known is not None:
        return known
    for name in CHAT_FIELDS:
        if name in fields:
            unused = tuple(other for other in ("tools", "functions") if other in fields)
            return ChatLayout((name,), options.turns, options.join, unused)
    if TEXT_FIELD in fields and not any(name in fields for name in TARGET_FIELDS):
        return TextLayout(TEXT_FIELD)
    return None


def _layout_of_flags(options: PairOptions, known: Layout | None, with_completion: bool) -> Layout | None:
    """The layout of --prompt-field, --template and --completion-field, completed by the known one."""
    template, prompt_field = options.template, options.prompt_field
    completion = options.completion_field or (known.completion if known else None)
    if completion is None and not with_completion:
        completion = "completion"
    if completion is None:
        return None
    if template is not None:
        parts = parse_template(template)
        if prompt_field is not None and prompt_field not in used_fields(parts):
            raise UserError(f"--template {template!r:.80} does not use --prompt-field {prompt_field!r:.40}, "
                            "drop one")
        return Layout(parts, completion, template)
    if prompt_field is not None:
        return Layout((Part(prompt_field, True),), completion, "{" + prompt_field + "}")
    return replace(known, completion=completion) if known else None


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
