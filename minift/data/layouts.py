"""Fields -> pairs of prompt and completion: known layouts, the user's template, chats, text alone.

A layout is chosen once for a file, from the flags and its first row, and then reads every row.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minift.data.chats import CHAT_FIELDS, is_turns, read_chat, read_chat_prompt
from minift.data.records import field_text, list_names
from minift.data.templates import Part, fill, needed_fields, parse_template, rename_fields, used_fields
from minift.errors import UserError

# (prompt template, completion field) of the layouts that are recognised by their fields. The first one whose fields
# are all in a file's first row is taken; the most general names come last.
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
# Beside one of these fields, `text` is probably a prompt and not a text to learn: the user has to decide.
TARGET_FIELDS = ("label", "labels", "target", "summary", "completion", "response", "answer", "output")

Ranges = tuple[tuple[int, int], ...]  # of characters, half-open


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, both with all white space that the file has."""

    prompt: str  # "" if the row is a text alone
    completion: str
    where: str  # "train.jsonl:12"
    learned: Ranges = ()  # of the prompt: the earlier answers of a chat, which are learned too


# ---- the three kinds of layout, with the same methods
#
# used: the fields that are read. needed: the fields without which a row has no prompt.
# read: the pair of a row. prompt_of: the prompt of a row that may lack its completion, and the ranges of the prompt
# that a run would learn. Both raise ValueError for a row that cannot be used. str: for the report.


@dataclass(frozen=True)
class Layout:
    """A prompt from a template, and a field that is the completion."""

    prompt: tuple[Part, ...]
    completion: str  # the field's name
    template: str  # of `prompt`, as the user or KNOWN_PAIRS has it

    @property
    def used(self) -> list[str]:
        return [*used_fields(self.prompt), self.completion]

    @property
    def needed(self) -> list[str]:
        return needed_fields(self.prompt)

    def prompt_of(self, fields: dict[str, Any]) -> tuple[str, Ranges]:
        return fill(self.prompt, fields), ()

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        return Pair(fill(self.prompt, fields), field_text(fields, self.completion), where)

    def __str__(self) -> str:
        names = ", ".join(used_fields(self.prompt))
        return f"fields {names} -> {self.completion}, template {self.template!r}"


@dataclass(frozen=True)
class ChatLayout:
    """Turns with roles, in one field or in several that follow one another."""

    names: tuple[str, ...]  # of these fields
    turns: str  # "all" answers are learned, or the "last"
    join: str
    unused: tuple[str, ...] = ()  # fields that belong to the chat and are not read, such as a list of tools

    @property
    def used(self) -> list[str]:
        return list(self.names)

    @property
    def needed(self) -> list[str]:
        return [self.names[0]]  # a second field holds the completion

    def prompt_of(self, fields: dict[str, Any]) -> tuple[str, Ranges]:
        # if all are missing, read_chat_prompt says so
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
    """A field with text of which every token is learned."""

    name: str

    @property
    def used(self) -> list[str]:
        return [self.name]

    @property
    def needed(self) -> list[str]:
        return [self.name]

    def prompt_of(self, fields: dict[str, Any]) -> tuple[str, Ranges]:
        return field_text(fields, self.name), ()

    def read(self, fields: dict[str, Any], where: str) -> Pair:
        return Pair("", field_text(fields, self.name), where)

    def __str__(self) -> str:
        return f"field {self.name} alone, without prompts: every token is learned"


AnyLayout = Layout | ChatLayout | TextLayout


# ---- the choice of a layout


@dataclass(frozen=True)
class PairOptions:
    """The flags that say how the fields of a record become a pair."""

    prompt_field: str | None = None
    completion_field: str | None = None
    template: str | None = None
    turns: str = "all"
    join: str = " "


def _known_layout(fields: dict[str, Any], with_completion: bool) -> Layout | None:
    """The first known layout that fits, or None. Case does not count: a field may be called Prompt or PROMPT."""
    # known name -> the file's name. An exact name wins, then the file's first field of that name in lower case.
    actual = {name.strip().lower(): name for name in reversed(fields)}
    actual |= {name: name for name in fields}
    for template, completion in KNOWN_PAIRS:
        parts = parse_template(template)
        needed = [*needed_fields(parts), completion] if with_completion else needed_fields(parts)
        if all(name in actual for name in needed):
            return Layout(rename_fields(parts, actual), actual.get(completion, completion), template)
    return None


def choose_layout(path: Path, fields: dict[str, Any], options: PairOptions,
                  with_completion: bool = True) -> AnyLayout:
    """The layout of the flags, completed by the first known one that fits a file's first row.

    `path` and `fields` are the file and that row. `with_completion` False: rows need no completions. Raises UserError
    if no layout fits, or if the flags name fields that the row lacks.
    """
    known = _known_layout(fields, with_completion)
    if options.prompt_field is None and options.completion_field is None and options.template is None:
        layout = _layout_without_flags(fields, options, known, with_completion)
    elif options.prompt_field == "" and options.template is None and options.completion_field in fields:
        # --prompt-field '' says that there are no prompts
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
    """The layout that fits the first row, or None: prompts first, then chats, then text alone."""
    if is_turns(fields.get("prompt")) and (is_turns(fields.get("completion")) or not with_completion):
        # "last": such a file says that the completion is learned, and not the answers in the prompt
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
    """The layout of --prompt-field, --template and --completion-field, completed by the known one, or None."""
    template, prompt_field = options.template, options.prompt_field
    completion = options.completion_field or (known.completion if known else None)
    if completion is None and not with_completion:
        completion = "completion"  # a Layout has a name for it, although no row is asked for it
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
    """Raises UserError for a field that the first row lacks, and for a prompt that holds the completion."""
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
