"""A record is one row of a file: its fields by name, and its file and line. Here fields become text."""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text",
    list: "a list", dict: "an object",
}  # fmt: skip
# Half of a surrogate pair: JSON can write it as "\\ud83d", but UTF-8 and the tokenizer cannot encode it.
HALF_CHARACTERS = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    where: str  # "train.jsonl:12"
    fields: dict[str, Any]
    problem: str = ""  # the reason why there are no fields


class Line(NamedTuple):
    number: int  # from 1
    text: str  # with its line end; empty if there is a problem
    problem: str = ""


class SourceFloat(float):
    """A number that keeps its digits as text: 2.50 in a file becomes the text 2.50, where float alone gives 2.5."""

    def __new__(cls, source: str) -> "SourceFloat":
        number = super().__new__(cls, source)
        number.source = source
        return number


def kind_of(value: Any) -> str:
    """The name of a JSON value's type, for an error message."""
    # SourceFloat is no key of KINDS, but a float
    return KINDS[float if isinstance(value, float) else type(value)]


def is_blank(fields: dict[str, Any], name: str) -> bool:
    """True for a field that is missing, null, or only white space."""
    value = fields.get(name)
    return value is None or isinstance(value, str) and not value.strip()


def field_text(fields: dict[str, Any], name: str) -> str:
    """A field as text: numbers as the file has them, true and false, objects and lists as JSON.

    Raises ValueError for a field that is missing or null.
    """
    if name not in fields:
        raise ValueError(f"no field {name!r:.40}, the row has {list_names(fields)}")
    value = fields[name]
    if value is None or value != value:  # NaN is how pandas writes a missing value
        raise ValueError(f"field {name!r:.40} is null, and must be text")
    if isinstance(value, str):
        text = value
    elif isinstance(value, SourceFloat):
        text = value.source
    else:
        text = to_json(value)
    # isascii() costs nothing, the search reads the text: most rows need only the first
    if not text.isascii() and HALF_CHARACTERS.search(text):
        raise ValueError(f"field {name!r:.40} holds half of a surrogate pair, which is no character")
    return text


def to_json(value: Any) -> str:
    """Raises ValueError for a value that is nested too deeply."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise ValueError("a value is nested too deeply") from None


def list_names(names: Iterable[str]) -> str:
    """The first twelve names, each cut at 40 characters: a hostile file may have millions of long ones."""
    shown = [f"{name!r:.40}" for name in names]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return (", ".join(shown[:12]) + more) or "no fields"
