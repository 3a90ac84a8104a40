"""Files of prompt-completion pairs: their formats, their known fields, and templates.

Files are taken for hostile: the limits below bound the memory they cost, a template is a list of texts and
field names and nothing more, and whatever is wrong is said with file and line.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minift.errors import UserError

MAX_LINE_BYTES = 16 * 2**20
MAX_JSON_BYTES = 256 * 2**20  # a JSON list is parsed in memory, and may stand on one line
FOREIGN_MARKS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text",
    list: "a list", dict: "an object",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A rendered prompt, a completion without surrounding white space, and their place: "train.jsonl:12"."""

    prompt: str
    completion: str
    where: str


class _Row(NamedTuple):
    where: str
    fields: dict[str, Any]
    problem: str = ""  # why there are no fields


def _lines(path: Path, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str, str]]:
    """Number from 1, text with its line end, and what is wrong with the line (its text is empty then). Only a
    line feed ends a line: U+2028, or a carriage return inside a JSON string, does not."""
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(limit + 1):
            number += 1
            if len(raw) > limit:
                yield number, "", f"more than {limit // 2**20} MiB in one line"
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(limit)
            elif b"\0" in raw:
                yield number, "", f"byte {raw.index(0) + 1} is NUL: binary or UTF-16, and must be UTF-8 text"
            else:
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8"), ""
                except UnicodeDecodeError as error:
                    yield number, "", f"byte {error.start + 1} ({raw[error.start]:#04x}) is not UTF-8"


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) < len(items):
        raise ValueError("an object names the same field twice")
    return fields


# Not strict: a raw tab or carriage return inside a string breaks JSON's rules, but can mean one thing only.
_decoder = json.JSONDecoder(strict=False, object_pairs_hook=_unique_keys)


def _parse_json(text: str) -> Any:
    """Raises ValueError that says in one line what is wrong."""
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None


def _read_jsonl(path: Path) -> Iterator[_Row]:
    for number, text, problem in _lines(path):
        where = f"{path.name}:{number}"
        if problem:
            yield _Row(where, {}, problem)
        elif text.strip():
            try:
                value = _parse_json(text)
            except ValueError as error:
                yield _Row(where, {}, str(error))
            else:
                yield _object_row(where, value)


def _object_row(where: str, value: Any) -> _Row:
    if isinstance(value, dict):
        return _Row(where, value)
    return _Row(where, {}, f"the row is {KINDS[type(value)]}, and must be an object")


def _read_json(path: Path) -> Iterator[_Row]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: more than {MAX_JSON_BYTES // 2**20} MiB, make it .jsonl, an object a line")
    texts = []
    for number, text, problem in _lines(path, MAX_JSON_BYTES):
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        texts.append(text)
    text = "".join(texts)
    if text.lstrip().startswith("{"):
        raise UserError(f"{path}: must be a list of objects; if each line is an object, name the file .jsonl")
    try:
        values = _parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: {KINDS[type(values)]}, and must be a list of objects")
    for number, value in enumerate(values, 1):
        yield _object_row(f"{path.name}: row {number}", value)


def _read_csv(path: Path) -> Iterator[_Row]:
    """The first row names the fields. Quoted fields may hold line ends; a row's place is its first line."""

    def lines() -> Iterator[str]:
        for number, text, problem in _lines(path):
            if problem:  # never skipped: it may lie inside quotes, and where the next row begins is unknown
                raise UserError(f"{path}:{number}: {problem}")
            yield from io.StringIO(text, newline="")  # also ends a line at a lone carriage return

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        where = f"{path.name}:{first}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            if header is None or reader.line_num > first:  # where the next row begins is unknown
                raise UserError(f"{path}:{first}: the row that begins here is not valid CSV: {error}, line "
                                f"{reader.line_num}; look for an unclosed quote") from None
            yield _Row(where, {}, f"not valid CSV: {error}")
            continue
        if values is None:
            return
        if header is None and values:
            header = values
            if len(set(header)) < len(header):
                raise UserError(f"{path}:{first}: the header names a field twice: {_names(header)}")
        elif values and len(values) != len(header):
            yield _Row(where, {}, f"{len(values)} fields, and the header has {len(header)}")
        elif values:
            yield _Row(where, dict(zip(header, values, strict=True)))


def _read_txt(path: Path) -> Iterator[_Row]:
    """`mr||ref`, the E2E challenge's text: the first || of a line parts prompt and completion."""
    for number, text, problem in _lines(path):
        mr, bars, ref = text.partition("||")
        if problem or text.strip():
            problem = problem or ("" if bars else "no || between prompt and completion")
            yield _Row(f"{path.name}:{number}", {} if problem else {"mr": mr, "ref": ref}, problem)


READERS: dict[str, Callable[[Path], Iterator[_Row]]] = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
    ".txt": _read_txt,
}  # fmt: skip


@cache
def parse_template(template: str) -> tuple[tuple[str, bool], ...]:
    """The parts of a template, each with whether it is a field's name (True) or text (False).

    `{name}` is a field, `{{` and `}}` are braces, a typed `\\n` is a line end. All else in braces
    (attributes, indices, conversions, formats, numbers) raises UserError.
    """
    if re.search("[\ud800-\udfff]", template):
        raise UserError(f"--template {template!a:.80}: not valid text, give it in UTF-8")
    parts = []
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+", template):
        token, name = match[0], match[1]
        if token in ("{", "}"):
            raise UserError(f"--template {template!r:.80}: lone {token} at character {match.start() + 1}, "
                            "double a brace that is text")
        if name is None:
            parts.append(({"{{": "{", "}}": "}"}.get(token, token).replace("\\n", "\n"), False))
        elif re.fullmatch(r"[^\W\d][\w -]*", name):
            parts.append((name, True))
        else:
            raise UserError(f"--template {template!r:.80}: {token!r:.40} is not a plain field name in braces")
    return tuple(parts)


def _template_fields(template: str) -> list[str]:
    return [part for part, is_field in parse_template(template) if is_field]


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"no field {name!r:.40}, the row has {_names(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r:.40} is {KINDS[type(value)]}, and must be text")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"field {name!r:.40} holds half of a surrogate pair, which is no character")
    return value


def _names(fields: Any) -> str:
    names = [f"{name!r:.40}" for name in fields]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "no fields"


def _from_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """Turns with roles: all before the last, the assistant's, are the prompt."""
    turns = fields.get("messages")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("field 'messages' must be a list of objects with role and content")
    roles = [_text(turn, "role") for turn in turns]
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"role {role!r:.40} in 'messages' must be system, user or assistant")
    if roles[-1] != "assistant":
        raise ValueError(f"the last of 'messages' is the {roles[-1]}'s, and must be the assistant's")
    texts = [_text(turn, "content").strip() for turn in turns]
    if not any(texts[:-1]):
        return {"prompt": "", "completion": texts[-1]}
    said = [f"{role.capitalize()}: {text}\n" for role, text in zip(roles[:-1], texts[:-1], strict=True)]
    return {"prompt": "".join(said) + "Assistant:", "completion": texts[-1]}


@dataclass(frozen=True)
class Layout:
    """How a row becomes a pair: the prompt's template and the completion's field."""

    template: str
    completion: str
    optional: str = ""  # a field that may be absent or blank; `bare` is the template then
    bare: str = ""
    messages: bool = False

    def fits(self, fields: dict[str, Any]) -> bool:
        needed = ["messages"] if self.messages else [*_template_fields(self.template), self.completion]
        return all(name in fields or name == self.optional for name in needed)

    def read(self, fields: dict[str, Any]) -> tuple[str, str]:
        """Prompt and completion; the prompt is "" if all its fields are blank. ValueError: a bad row."""
        if self.messages:
            fields = _from_messages(fields)
        template = self.template
        if self.optional and (fields.get(self.optional) is None or not _text(fields, self.optional).strip()):
            template = self.bare
        parts = parse_template(template)
        texts = [(_text(fields, part), True) if is_field else (part, False) for part, is_field in parts]
        completion = _text(fields, self.completion).strip()
        if not any(text.strip() for text, is_field in texts if is_field):
            return "", completion
        return "".join(text for text, _ in texts), completion

    def __str__(self) -> str:
        if self.messages:
            return "field messages, the last turn is the completion"
        bare = f", without {self.optional} {self.bare!r}" if self.optional else ""
        names = ", ".join(dict.fromkeys(_template_fields(self.template)))
        return f"fields {names} -> {self.completion}, template {self.template!r}{bare}"


KNOWN_LAYOUTS = (
    Layout("{prompt}", "completion"),
    Layout("{instruction}\n\nInput:\n{input}\n\nAnswer:", "output", "input", "{instruction}\n\nAnswer:"),
    Layout("{dialogue}\n\nSummary:", "summary"),
    Layout("{mr}\n\nText:", "ref"),
    Layout("{context}", "completion"),
    Layout("{prompt}", "completion", messages=True),
)


def _choose_layout(path: Path, fields: dict[str, Any], prompt_field: str | None, completion_field: str | None,
                   template: str | None) -> Layout:
    """What the flags say, and where they are silent, the first known layout that fits the first row."""
    known = next((layout for layout in KNOWN_LAYOUTS if layout.fits(fields)), None)
    if known and known.messages:
        if prompt_field is completion_field is template is None:
            return known
        known = None
    if template is None and prompt_field is not None:
        template = "{" + prompt_field + "}"
    elif prompt_field is not None and prompt_field not in _template_fields(template):
        raise UserError(f"--template {template!r:.80} does not use --prompt-field {prompt_field}, drop one")
    completion = completion_field or (known.completion if known else None)
    if completion is None or (template is None and known is None):
        raise UserError(f"{path}: which of its fields {_names(fields)} are prompt and completion? "
                        "Say it with --prompt-field (or --template) and --completion-field")
    layout = replace(known, completion=completion) if template is None else Layout(template, completion)
    used = _template_fields(layout.template)
    for name in [*used, completion]:
        if name not in fields and name != layout.optional:
            raise UserError(f"{path}: no field {name!r:.40}, there are {_names(fields)}: "
                            "change --prompt-field, --completion-field or --template")
    if not used or completion in used:
        wrong = f"holds the completion's field {completion!r:.40}" if used else "uses no field"
        raise UserError(f"{path}: the prompt's template {layout.template!r:.80} {wrong}: "
                        "change --prompt-field, --completion-field or --template")
    return layout


def _read_rows(path: Path) -> Iterator[_Row]:
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a' if os.path.exists(path) else 'no such'} file, give --data another")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r:.20}, known are {' '.join(READERS)}")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        for mark, name in FOREIGN_MARKS.items():
            if start.startswith(mark):
                raise UserError(f"{path}: this is {name}, convert it to UTF-8 (iconv -f {name} -t UTF-8)")
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_file(path: Path, prompt_field: str | None = None, completion_field: str | None = None,
              template: str | None = None, skip_bad: bool = False) -> tuple[list[Pair], list[str]]:
    """The usable pairs of a file in their order, and notes: the layout, what was dropped and why, duplicates.

    Raises UserError for a file that cannot be read, a layout that is not known, no usable row, and, unless
    `skip_bad`, the first malformed row.
    """
    pairs, bad, layout = [], [], None
    empty: dict[str, list[str]] = {"prompt": [], "completion": []}  # places
    for row in _read_rows(path):
        problem = row.problem
        if not problem:
            layout = layout or _choose_layout(path, row.fields, prompt_field, completion_field, template)
            try:
                prompt, completion = layout.read(row.fields)
            except ValueError as error:
                problem = str(error)
        if problem and not skip_bad:
            raise UserError(f"{path.with_name(row.where)}: {problem} (--skip-bad goes on without such rows)")
        if problem:
            bad.append(f"{row.where}: {problem}")
        elif prompt and completion:
            pairs.append(Pair(prompt, completion, row.where))
        else:
            empty["completion" if prompt else "prompt"].append(row.where)
    lost = [f"malformed rows skipped: {len(bad):,}, {'; '.join(bad[:3])}"] if bad else []
    lost += [f"rows dropped for an empty {what}: {len(places):,}, first {places[0]}"
             for what, places in empty.items() if places]
    if not pairs:
        raise UserError(f"{path}: no usable row, {'; '.join(lost) or 'the file holds none'}")
    notes = [f"usable rows: {len(pairs):,}, {layout}", *lost]
    repeats = len(pairs) - len({(pair.prompt, pair.completion) for pair in pairs})
    if repeats:
        notes.append(f"rows that repeat an earlier one exactly, kept: {repeats:,}")
    return pairs, [f"{path.name}: {note}" for note in notes]
