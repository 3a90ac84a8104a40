r"""A template is a list of texts and names of fields. Nothing in it is ever executed, unlike with str.format.

{name} is a field. {?name: ...} is optional: it is used only if that field is not blank, and may hold {fields}.
{{ and }} are braces. The two characters \n are a line end, as a shell passes them on.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from minift.data.records import HALF_CHARACTERS, field_text, is_blank
from minift.errors import UserError

NAME = r"(?:[^\W\d]|#)[\w #-]*"  # a letter, _ or #, then also digits, spaces and hyphens
# {?name: then any of: a character that is no brace, {{, }}, {field}; then }
OPTIONAL = re.compile(rf"\{{\?({NAME}):((?:[^{{}}]|\{{\{{|\}}\}}|\{{[^{{}}]*\}})*)\}}")
# {{ or }} or {anything without braces} or a lone brace or a text without braces: together all of a template
TOKENS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Part(NamedTuple):
    text: str  # a text, or the name of a field
    is_field: bool
    only_with: str = ""  # used only where this field is not blank


@cache
def parse_template(template: str) -> tuple[Part, ...]:
    """The parts of a template. Raises UserError for a lone brace, and for anything in braces that is no name."""
    if HALF_CHARACTERS.search(template):
        raise UserError(f"--template {template!a:.80}: not valid text, give it in UTF-8")
    parts: list[Part] = []
    begin = 0
    for match in _optionals(template):
        parts += _parse_plain(template, template[begin : match.start()], begin)
        inside = _parse_plain(template, match[2], match.start(2))
        parts += [Part(text, is_field, match[1]) for text, is_field, _ in inside]
        begin = match.end()
    return tuple(parts + _parse_plain(template, template[begin:], begin))


def _optionals(template: str) -> Iterator[re.Match[str]]:
    """The matches of {?name: ...} in a template. Not OPTIONAL.finditer: it would find one inside {{?name: ...}}."""
    begin = 0
    while begin < len(template):
        if template.startswith(("{{", "}}"), begin):
            begin += 2
        elif match := OPTIONAL.match(template, begin):
            yield match
            begin = match.end()
        else:
            begin += 1


def _parse_plain(template: str, piece: str, offset: int) -> list[Part]:
    """The parts of a piece of a template that has no optional parts; `offset` is where the piece begins."""
    parts = []
    for match in TOKENS.finditer(piece):
        token, name = match[0], match[1]
        if token in ("{", "}"):
            raise UserError(f"--template {template!r:.80}: lone {token} at character "
                            f"{offset + match.start() + 1}, double a brace that is text")
        if name is None:
            text = {"{{": "{", "}}": "}"}.get(token, token).replace("\\n", "\n")
            parts.append(Part(text, False))
        elif re.fullmatch(NAME, name) and not name.endswith(" "):
            parts.append(Part(name, True))
        else:
            raise UserError(f"--template {template!r:.80}: {token!r:.40} is not a plain field name in braces")
    return parts


def rename_fields(parts: tuple[Part, ...], names: dict[str, str]) -> tuple[Part, ...]:
    """The same parts with the fields of `names` (old name -> new name) renamed."""
    renamed = []
    for text, is_field, only_with in parts:
        text = names.get(text, text) if is_field else text
        renamed.append(Part(text, is_field, names.get(only_with, only_with)))
    return tuple(renamed)


def used_fields(parts: tuple[Part, ...]) -> list[str]:
    """The names of all fields, each once."""
    # dict.fromkeys drops repeated names and keeps the order
    return list(dict.fromkeys(part.text for part in parts if part.is_field))


def needed_fields(parts: tuple[Part, ...]) -> list[str]:
    """The names of the fields that every row must have."""
    return list(dict.fromkeys(part.text for part in parts if part.is_field and not part.only_with))


def fill(parts: tuple[Part, ...], fields: dict[str, Any]) -> str:
    """The text of a row; "" if all its fields are blank. Raises ValueError for a field that cannot be used."""
    texts = []
    blank = True
    for part in parts:
        if part.only_with and is_blank(fields, part.only_with):
            continue
        text = field_text(fields, part.text) if part.is_field else part.text
        if part.is_field and text.strip():
            blank = False
        texts.append(text)
    return "" if blank else "".join(texts)
