"""Imports go one way, from room to room: a reader of one file needs those before it and no other."""

import ast
from pathlib import Path

from scripts import ROOT

ORDER = [  # a module imports from its own line and those above it
    ("minift", "errors", "options", "quick_help"),
    ("distributed", "openmp", "device"),
    ("ops",),
    ("model",),
    ("modes",),
    ("data",),
    ("files",),
    ("run",),
    ("report",),
    ("training", "graphs", "progress", "trials"),
    ("plan", "bench"),
    ("train", "eval"),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# packages that a function may import
LATE = {
    "triton": "exists on some platforms alone",
    "matplotlib": "is optional",
    "huggingface_hub": "needed only to fetch a model by name",
    "resource": "exists on Unix alone",
    "peft": "is optional: the benchmark compares with it if it is installed",
    "torch.distributed": "takes long to import, and needed only with several processes",
    "torch._subclasses": "takes long to import, and needed only by a plan",
    "torch._dynamo": "takes long to import, and needed only by a training",
}
FILES = sorted([*ROOT.glob("minift/**/*.py"), ROOT / "train.py", ROOT / "eval.py"])


def module_name(path: Path) -> str:
    """minift.model.gpt for minift/model/gpt.py, minift.modes for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def room(module: str) -> str:
    return module.split(".")[1] if module.startswith("minift.") else module


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names: `from minift import modes` names minift.modes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in names]
    return []


def own_imports(module: str) -> set[str]:
    """The project's modules that a module imports, those inside functions included."""
    found = {name for node in ast.walk(MODULES[module]) for name in imported(node)}
    return {name for name in found if name in MODULES}


def test_imports_are_absolute() -> None:
    for module, tree in MODULES.items():
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, f"{module}, lines {relative}"


def test_rooms_import_from_rooms_above_alone() -> None:
    assert {room(module) for module in MODULES} <= RANK.keys(), "a new room needs a place in ORDER"
    wrong = []
    for module in MODULES:
        for other in own_imports(module):
            if RANK[room(other)] > RANK[room(module)]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_there_is_no_cycle() -> None:
    graph = {module: own_imports(module) for module in MODULES}
    while leaves := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for module in leaves:
            del graph[module]
    cycle = {module: needed & graph.keys() for module, needed in graph.items()}
    assert not cycle, "these import one another, or a module that does"


def test_functions_import_nothing_but_what_is_excused() -> None:
    wrong = []
    for module, tree in MODULES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in functions:
            for name in (name for node in ast.walk(function) for name in imported(node)):
                late = any(f"{name}.".startswith(f"{package}.") for package in LATE)
                # Triton is imported with this file, which is therefore imported late itself
                if not late and not ("triton" in name and name in MODULES):
                    wrong.append(f"{module}.{function.name} imports {name}")
    assert not wrong
