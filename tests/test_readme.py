"""The README's commands and its library example run as they are written."""

import re
import shlex
from pathlib import Path

import pytest
from scripts import ROOT, evaluate, train, write_pairs

from minift.run.config import TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ("--steps", "2", "--val-rows", "4", "--test-rows", "4", "--max-new-tokens", "4", "--general", "short.txt")


def commands() -> list[list[str]]:
    """Every command line of train.py and eval.py, in order; test_distributed.py has torchrun's, test_bench.py
    and test_train.py the benchmarks'."""
    lines = re.findall(r"^    python (.*)$|`python ((?:train|eval)\.py .*?)`", README, re.M)
    found = dict.fromkeys(tuple(shlex.split(a or b, comments=True)) for a, b in lines)  # each once
    return [list(words) for words in found if words[0] in ("train.py", "eval.py")]


@pytest.mark.usefixtures("quick")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few steps and rows, the embedded base in the place of GPT-2, and a file of pairs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    pairs = write_pairs(tmp_path / "pairs")
    (tmp_path / "my.jsonl").write_bytes((pairs / "train.jsonl").read_bytes())
    (tmp_path / "short.txt").write_text((TINY / "general.txt").read_text()[:2000])
    (tmp_path / "new.jsonl").write_text('{"dialogue": "Anna: Hi, Ben"}\n')
    (tmp_path / "pairs.csv").write_text("more,less\nHe is a nurse.,She is a nurse.\nShe is late.,He is late.\n")
    assert len(commands()) >= 18
    for script, *words in commands():
        smaller = {"gpt2": str(TINY), "gpt2-xl": "distilgpt2"}  # the plan of GPT-2 XL takes a minute
        replaced = [smaller.get(word, word) for word in words]
        if "--mode" in words and words[words.index("--mode") + 1] == "all" and "--plan" not in words:
            replaced[words.index("--mode") + 1] = "selective,lora"  # test_embedded.py has all modes
        if words[-1] == "runs/*":
            replaced[-1:] = map(str, sorted(Path("runs").iterdir()))
        if script == "eval.py" and not {"--compare", "--save", "--save-peft", "--prompt", "--predict"} & set(words):
            replaced += ["--test-rows", "4", "--max-new-tokens", "4"]
        if script == "train.py" and not {"--plan", "--resume", "--help"} & set(words):
            replaced += SMALL
        ended = (train if script == "train.py" else evaluate)(*replaced)
        assert ended.code == 0, f"{script} {' '.join(words)}: {ended.err}"
        for option in ("--save", "--save-peft"):
            if option in words:
                assert any(Path(words[words.index(option) + 1]).iterdir()), words
        if "--compare" in words:
            assert Path("runs/compare.md").exists()


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(from pathlib.*?)```", README, re.S)[1], names)
    assert (tmp_path / "tuned-by-hand" / "model.safetensors").exists() and names["new"]
