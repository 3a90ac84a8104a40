r"""A template is a list of texts and field names, and nothing more: nothing in it is ever executed.

{name} is a field; {?name: ...} is used only where that field is not blank, and may hold {fields} itself;
{{ and }} are braces; a typed \n is a line end.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from minift.data.records import HALF_CHARACTERS, field_text, is_blank
from minift.errors import UserError

NAME = r"(?:[^\W\d]|#)[\w #-]*"
OPTIONAL = re.compile(rf"\{{\?({NAME}):((?:[^{{}}]|\{{\{{|\}}\}}|\{{[^{{}}]*\}})*)\}}")
TOKENS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Part(NamedTuple):
    text: str  # a text, or the name of a field
    is_field: bool
    only_with: str = ""  # used only where this field is not blank


@cache
def parse_template(template: str) -> tuple[Part, ...]:
    """The parts of a template. All else in braces (attributes, indices, formats) raises UserError."""
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
    """The {?name: ...} of a template; the brace of an escaped {{ begins none."""
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
    """The parts of a piece without optional ones; `offset` is its place in the template."""
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
    renamed = []
    for text, is_field, only_with in parts:
        text = names.get(text, text) if is_field else text
        renamed.append(Part(text, is_field, names.get(only_with, only_with)))
    return tuple(renamed)


def used_fields(parts: tuple[Part, ...]) -> list[str]:
    """The names of all fields, each once."""
    return list(dict.fromkeys(part.text for part in parts if part.is_field))


def needed_fields(parts: tuple[Part, ...]) -> list[str]:
    """The names of the fields that every row must have."""
    return list(dict.fromkeys(part.text for part in parts if part.is_field and not part.only_with))


def fill(parts: tuple[Part, ...], fields: dict[str, Any]) -> str:
    """The text; "" if all fields in it are blank. Raises ValueError for a field that cannot be used."""
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
