"""--help without torch, whose import takes longer than everything else that --help does.

The options of a run and of its modes are in modules that import torch. Here only those statements of a module are
executed that an option needs, so the text is the same, and a new mode needs nothing.
"""

import argparse
import ast
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def exit_with_help(make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Print the help and end the script, if the command line asks for it."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        with contextlib.suppress(Exception):  # then the script prints its help itself, after torch's import
            make_parser().print_help()
            sys.exit()


def train_parser() -> argparse.ArgumentParser:
    options = {name: mode_options(name) for name in partial_module("minift.modes").NAMES}
    return partial_module("minift.run.config").make_parser(partial_module("train").__doc__, options)


def eval_parser() -> argparse.ArgumentParser:
    return partial_module("eval").make_parser()


def mode_options(name: str) -> type:
    """The options of a mode: the second argument in `MODE = Mode(name, Options, ...)`."""
    module = partial_module(f"minift.modes.{name}")
    return module.compute(ast.Expression(module.statements["MODE"].value.args[1]), "eval")


class PartialModule:
    """A module of this project whose statements are executed when one of their names is needed."""

    def __init__(self, name: str):
        self.__name__, self.__file__ = name, str(module_path(name))
        self.statements: dict[str, ast.stmt] = {}  # {a name: the statement that binds it}
        tree = ast.parse(Path(self.__file__).read_text(encoding="utf-8"))
        self.__doc__ = ast.get_docstring(tree, clean=False)
        for statement in tree.body:
            self.statements |= dict.fromkeys(bound_names(statement), statement)

    def __getattr__(self, name: str) -> Any:  # Python calls it for names that have no value yet
        if name not in self.statements:
            raise AttributeError(f"{self.__name__} has no {name}")
        statement = self.statements.pop(name)  # a function may name itself
        if isinstance(statement, ast.ImportFrom) and statement.module.split(".")[0] == "minift":
            original = next(alias.name for alias in statement.names if name in (alias.name, alias.asname))
            if module_path(f"{statement.module}.{original}") is not None:
                value = partial_module(f"{statement.module}.{original}")
            else:
                value = getattr(partial_module(statement.module), original)
            setattr(self, name, value)
        else:
            self.compute(ast.Module([statement], []), "exec")
        return vars(self)[name]

    def compute(self, code: ast.Module | ast.Expression, kind: str) -> Any:
        for name in names(code, ast.Load):
            if name in self.statements:
                getattr(self, name)
        return eval(compile(code, self.__file__, kind), vars(self))


partial_module = functools.cache(PartialModule)


def module_path(name: str) -> Path | None:
    base = ROOT / name.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def bound_names(statement: ast.stmt) -> list[str]:
    """The global names that a statement gives a value."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    return names(statement, ast.Store)


def names(tree: ast.AST, context: type) -> list[str]:
    """The plain names that a piece of code reads (ast.Load) or writes (ast.Store)."""
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)]
