"""A record is one row of a file: named fields, and the row's place."""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text",
    list: "a list", dict: "an object",
}  # fmt: skip
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
    """A number that remembers its digits: 2.50 in a file is written out as 2.50."""

    def __new__(cls, source: str) -> "SourceFloat":
        number = super().__new__(cls, source)
        number.source = source
        return number


def kind_of(value: Any) -> str:
    return KINDS[float if isinstance(value, float) else type(value)]


def is_blank(fields: dict[str, Any], name: str) -> bool:
    """True for a field that is missing, null, or white space alone."""
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
    text = value if isinstance(value, str) else _written_out(value)
    if not text.isascii() and HALF_CHARACTERS.search(text):
        raise ValueError(f"field {name!r:.40} holds half of a surrogate pair, which is no character")
    return text


def _written_out(value: Any) -> str:
    if isinstance(value, SourceFloat):
        return value.source
    return to_json(value)


def to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise ValueError("a value is nested too deeply") from None


def list_names(names: Iterable[str]) -> str:
    shown = [f"{name!r:.40}" for name in names]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return (", ".join(shown[:12]) + more) or "no fields"
