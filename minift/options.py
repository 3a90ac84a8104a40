"""Options are frozen dataclasses. Each field has its help text and bounds; the command line is made from them.

On the command line every flag defaults to None, not to the field's default. So `resolve` knows the origin of each
value: the command line, another default that a mode or a base gives, or the field's default.
"""

import argparse
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from minift.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str | None = None, *, choices: tuple[str, ...] | None = None,
           least: float | None = None, most: float | None = None, above: float | None = None,
           below: float | None = None) -> Any:
    """A dataclass field with its help text, its choices and its bounds. `least` and `most` are allowed values,
    `above` and `below` are not. A field without a help text has no flag: only a file can set it."""
    bounds = {"least": least, "most": most, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one-line UserErrors and no guessing of abbreviated flags."""

    def __init__(self, **settings: Any):
        self.kinds: dict[str, type] = {}  # the type of each flag, to find two modes that disagree about one
        # allow_abbrev=False: --batch must not silently match a longer flag
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        # cut, since argparse repeats the argument, however long it is
        raise UserError(f"{message:.300} ({self.prog} --help lists every option)")


def parse_float(text: str) -> float:
    """A finite number. Raises ValueError."""
    value = float(text)
    if not math.isfinite(value):  # float() reads "nan" and "inf"
        raise ValueError
    return value


def parse_int(text: str) -> int:
    """An integer that a float can hold exactly. Raises ValueError."""
    value = int(text)
    if abs(value) > 2**53:
        raise ValueError
    return value


def parse_list(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for one value, as `parse` reads it, or for a comma list of different values: a tuple."""
    def parse_values(text: str) -> Any:
        values = tuple(parse(part) for part in text.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text:.40}: a value is repeated")
        return values if len(values) > 1 else values[0]

    parse_values.__name__ = parse.__name__  # argparse's messages have it
    return parse_values


# argparse's messages have these names: "invalid number value: 'nan'"
parse_float.__name__, parse_int.__name__ = "number", "whole number"
PARSERS: dict[type, Callable[[str], Any]] = {float: parse_float, int: parse_int}


def flag(name: str) -> str:
    """The flag of a field: "--max-length" for "max_length"."""
    return "--" + name.replace("_", "-")


def add_options(parser: Parser, title: str, options: type, lists: dict[str, Callable] | None = None) -> None:
    """Add a group of flags: one for each field of the dataclass `options` that has a help text. Two modes may share a
    flag: the later group only mentions it. Raises TypeError if the two want different types.

    lists: the fields whose flags also take a comma list, with the parsers of such a list."""
    group = parser.add_argument_group(title)
    shared, lists = [], lists or {}
    for field in dataclasses.fields(options):
        help, choices = field.metadata["help"], field.metadata["choices"]
        if help is None:
            continue
        name = flag(field.name)
        kind = value_type(options, field.name)
        if name in parser.kinds:  # argparse refuses to add a flag twice
            if parser.kinds[name] != kind:
                raise TypeError(f"{title}: {name} is {kind.__name__} here and another type in an earlier group")
            shared.append(name)
            continue
        parser.kinds[name] = kind
        help = help.replace("%", "%%")  # argparse formats help texts with the % operator
        if kind is bool:  # --shard and --no-shard
            group.add_argument(name, default=None, help=help, action=argparse.BooleanOptionalAction)
            continue
        if field.default is not None:
            help += f" (default {field.default})"
        parse = lists.get(field.name) or PARSERS.get(kind, kind)
        metavar = None if choices else kind.__name__.upper()  # None: argparse shows the choices
        if field.name in lists:
            metavar += "[,...]"
        group.add_argument(name, default=None, help=help, choices=choices, type=parse, metavar=metavar)
    if shared:
        group.description = f"also {', '.join(shared)}, described above"


def value_type(options: type, name: str) -> type:
    """The type of a field's values: int for `int | None`."""
    hint = typing.get_type_hints(options)[name]
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def check_bounds(options: Any) -> None:
    """Raises UserError for a value outside the bounds that its field declares."""
    for field in dataclasses.fields(options):
        value, bounds = getattr(options, field.name), field.metadata["bounds"]
        if value is None:  # an optional option that was not given
            continue
        for word, bound, holds in (
            ("at least", bounds["least"], operator.ge),
            ("at most", bounds["most"], operator.le),
            ("above", bounds["above"], operator.gt),
            ("below", bounds["below"], operator.lt),
        ):
            if bound is not None and not holds(value, bound):  # `not`: nan compares False with all
                raise UserError(f"{flag(field.name)} {value}: must be {word} {bound:,}")


def from_json(options: type[T], raw: Any, where: str) -> T:
    """The dataclass from a parsed JSON object, with its defaults for missing names. Raises UserError for
    unknown names and for values of the wrong type."""
    if not isinstance(raw, dict):
        raise UserError(f"{where} cannot be used: {options.__name__} is {raw!r:.60}, and must be an object")
    hints = typing.get_type_hints(options)
    for name, value in raw.items():
        if name not in hints:
            raise UserError(f"{where} cannot be used: {name!r:.60} is no option of this version: update it")
        kinds = typing.get_args(hints[name]) or (hints[name],)  # (int, NoneType) for `int | None`
        choices = options.__dataclass_fields__[name].metadata.get("choices")
        # type() and not isinstance: true is an int for isinstance. JSON writes the float 1.0 also as 1.
        right_type = type(value) in kinds or (type(value) is int and float in kinds)
        if not right_type or (choices and value not in choices):
            allowed = ", ".join(choices or (kind.__name__ for kind in kinds))
            raise UserError(f"{where} cannot be used: {name} is {value!r:.60}, and must be {allowed}")
    return options(**raw)


def resolve(options: type[T], args: argparse.Namespace,
            overrides: dict[str, tuple[Any, str]]) -> tuple[T, dict[str, tuple[Any, str]]]:
    """The dataclass `options` with its values from the command line, else from `overrides`, else by default.

    overrides: {field: (value, origin)}, such as {"lr": (1e-3, "mode lora")}.
    Also returns the origin of every value, in the same form. Raises UserError for a value out of bounds.
    """
    origins = {}
    for field in dataclasses.fields(options):
        given = getattr(args, field.name, None)  # None: the flag was not given, or the field has none
        if given is not None:
            origins[field.name] = (given, "command line")
        elif field.name in overrides:
            origins[field.name] = overrides[field.name]
        else:
            origins[field.name] = (field.default, "default")
    resolved = options(**{name: value for name, (value, _) in origins.items()})
    check_bounds(resolved)
    return resolved, origins
