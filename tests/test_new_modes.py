"""A newcomer's modes: (IA)^3 from minift/modes/README.md, DoRA and prefix tuning from tests/new_modes, each one file
and one line.

They are put into a copy of the project. There the checks of tests/new_modes/in_a_copy.py run, and all tests of
test_modes.py that hold for every mode.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scripts import ROOT

README = (ROOT / "minift" / "modes" / "README.md").read_text(encoding="utf-8")
IA3 = re.search(r'```python\n("""\(IA\)\^3.*?)```', README, re.S)[1]  # the example as readers find it
SMALL = {  # each one's line in the list of modes that the tests use
    "ia3": "SmallMode({}, 3e-2)",
    "dora": 'SmallMode({"rank": 2, "alpha": 5.0, "targets": "qkv,fc"}, 3e-2)',
    "prefix": 'SmallMode({"prefix_length": 3}, 3e-2)',
}


def insert(path: Path, before: str, lines: list[str]) -> None:
    """Put lines before the first line that begins with `before`."""
    old = path.read_text(encoding="utf-8").splitlines()
    index = next(i for i, line in enumerate(old) if line.startswith(before))
    path.write_text("\n".join([*old[:index], *lines, *old[index:]]) + "\n", encoding="utf-8")


def copy_project(folder: Path) -> None:
    """A copy of the project with a file and a line for each new mode."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("minift", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("train.py", "eval.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "minift" / "modes" / "ia3.py").write_text(IA3, encoding="utf-8")
    for name in ("dora", "prefix"):
        shutil.copy(folder / "tests" / "new_modes" / f"{name}.py", folder / "minift" / "modes")
    insert(folder / "minift" / "modes" / "__init__.py", '    "full",', [f'    "{name}",' for name in SMALL])
    insert(folder / "tests" / "scripts.py", '    "full":', [f'    "{name}": {small},' for name, small in SMALL.items()])


def test_newcomers_modes(tmp_path: Path) -> None:
    copy_project(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/new_modes/in_a_copy.py",
         "tests/test_modes.py", "-k", "ia3 or dora or prefix or every_mode_of_the_registry"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 40 and "skipped" not in done.stdout, done.stdout
