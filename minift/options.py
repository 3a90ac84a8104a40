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

from .errors import UserError

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
        raise UserError(f"{message} ({self.prog} --help lists every option)")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
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
                               type=finite if kind is float else kind,
                               metavar=None if choices else kind.__name__.upper())


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
