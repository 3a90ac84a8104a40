"""Options are frozen dataclasses: each field carries its help, and the command line is made from them.

Every flag starts as None, so that a value's origin is known: the command line, the mode's own default, or the
default.
"""

import argparse
import dataclasses
import math
import types
import typing
from typing import Any, NoReturn, TypeVar

from minift.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with the text and the choices that its command-line flag shows."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one-line UserErrors and no guessing of abbreviated flags."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message:.300} ({self.prog} --help lists every option)")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def whole(text: str) -> int:
    value = int(text)
    if abs(value) > 2**53:
        raise ValueError
    return value


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, title: str, options: type) -> None:
    """One group of flags, one flag for each field of the dataclass `options`."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: the flag takes an int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"]
        if field.default is not None and kind is not bool:
            text += f" (default {field.default})"
        if kind is bool:
            group.add_argument(flag(field.name), default=None, help=text,
                               action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(flag(field.name), default=None, help=text, choices=choices,
                               type={float: finite, int: whole}.get(kind, kind),
                               metavar=None if choices else kind.__name__.upper())


def from_json(options: type[T], raw: Any, where: str) -> T:
    """The dataclass from a parsed JSON object, with its defaults for what is not there. Raises UserError for
    unknown names and for values of the wrong kind."""
    if not isinstance(raw, dict):
        raise UserError(f"{where} cannot be used: {options.__name__} is {raw!r:.60}, and must be an object")
    hints = typing.get_type_hints(options)
    for name, value in raw.items():
        if name not in hints:
            raise UserError(f"{where} cannot be used: {name!r:.60} is no option of this version: update it")
        kinds = typing.get_args(hints[name]) or (hints[name],)
        choices = options.__dataclass_fields__[name].metadata.get("choices")
        if type(value) not in kinds and not (type(value) is int and float in kinds) or (
                choices and value not in choices):
            allowed = ", ".join(choices or (kind.__name__ for kind in kinds))
            raise UserError(f"{where} cannot be used: {name} is {value!r:.60}, and must be {allowed}")
    return options(**raw)


def resolve(options: type[T], args: argparse.Namespace,
            overrides: dict[str, tuple[Any, str]]) -> tuple[T, dict[str, tuple[Any, str]]]:
    """The dataclass filled from the command line, else from `overrides`, else by default; and where each
    value came from. Overrides and origins are {field: (value, origin)}."""
    origins = {}
    for field in dataclasses.fields(options):
        given = getattr(args, field.name)
        if given is not None:
            origins[field.name] = (given, "command line")
        elif field.name in overrides:
            origins[field.name] = overrides[field.name]
        else:
            origins[field.name] = (field.default, "default")
    return options(**{name: value for name, (value, _) in origins.items()}), origins
