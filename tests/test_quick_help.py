"""--help is the text of the full command line, without the seconds that torch's import takes."""

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, evaluate, train
from test_new_modes import copy_project

from minift import quick_help

# the script, without torch and the other packages
WITHOUT_PACKAGES = """
import runpy, sys
for package in ("torch", "numpy", "tokenizers", "tqdm", "triton"):
    sys.modules[package] = None  # its import fails
sys.path.insert(0, "")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def quick(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_PACKAGES, script, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("script, full", [("train.py", train), ("eval.py", evaluate)])
@pytest.mark.parametrize("arguments", [["--help"], ["--batch", "4", "-h"]])
def test_help_is_the_same_without_torch(script: str, full: object, arguments: list[str]) -> None:
    done = quick(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == full("--help").out and "--max-new-tokens" in done.stdout


def test_new_modes_are_in_the_help(tmp_path: Path) -> None:
    """(IA)^3 has no options, prefix tuning its own, and DoRA those of LoRA."""
    copy_project(tmp_path)
    done = quick("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    full = "import train\ntrain.main(['--help'])"
    other = subprocess.run([sys.executable, "-c", full], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == other.stdout
    words = " ".join(done.stdout.split())
    assert "how to tune: ia3, dora, prefix, full" in words and "--prefix-length INT" in words
    assert "mode lora: also --rank, --alpha" in words  # DoRA comes first


def test_a_help_that_needs_torch_is_left_to_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_torch() -> None:
        raise ImportError

    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    quick_help.exit_with_help(needs_torch)  # returns
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch", "4"])
    quick_help.exit_with_help(lambda: pytest.fail("no help was asked for"))
