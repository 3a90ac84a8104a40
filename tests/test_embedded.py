"""The embedded base in data/tiny, tuned by train.py as a newcomer does, at a smaller scale."""

import json
import re
from pathlib import Path

import pytest
from scripts import json_of, metrics, trained

from minift import modes
from minift.files import checkpoint, weights
from minift.run.config import TINY

pytestmark = pytest.mark.usefixtures("quick")

SMALL = ("--val-rows", "48", "--test-rows", "24", "--max-new-tokens", "32")


def test_overfitting_is_seen_stopped_and_undone(tmp_path: Path) -> None:
    """Sixty rows, thirty epochs: the training loss falls on while the validation loss turns up."""
    text = trained("--epochs", 30, "--rows", 60, "--out", tmp_path / "r", *SMALL)
    lines = [line for line in metrics(tmp_path / "r") if "val_loss" in line]
    val, train = [line["val_loss"] for line in lines], [line["train_loss"] for line in lines]
    best = val.index(min(val))
    assert 0 < best < len(val) - 1 and val[-1] > val[best] and train[-1] < train[best]
    result = json_of(tmp_path / "r" / "result.json")
    assert result["stopped_early"] and result["steps"] < 120 and "stopped early" in text
    assert result["best_val_loss"] == val[best] and result["best_step"] == lines[best]["step"]

    tuned = weights.load(str(TINY)).model
    checkpoint.apply_tuned(tuned, checkpoint.read_tuned(tmp_path / "r", tuned.config))
    kept = checkpoint.checksum(modes.tuned_parameters(tuned), {})
    last, _ = checkpoint.read(tmp_path / "r" / checkpoint.LAST)
    end = {name.removeprefix("tuned."): t for name, t in last.items() if name.startswith("tuned.")}
    assert kept != checkpoint.checksum(end, {})  # what was kept is not where the run stopped


def test_a_short_comparison_measures_forgetting(tmp_path: Path) -> None:
    """Every mode beats the base even after a few steps, and the three files say the same."""
    short = tmp_path / "short.txt"
    short.write_text((TINY / "general.txt").read_text()[:6_000])
    text = trained("--mode", "all", "--steps", 15, "--general", short, "--out", tmp_path / "all", *SMALL)
    results = json_of(tmp_path / "all" / "compare.json")
    assert [result["mode"] for result in results] == list(modes.MODES)
    assert all(result["test_loss"] < result["base_test_loss"] for result in results)
    assert all(isinstance(result["forgetting"], float) for result in results)
    written = (tmp_path / "all" / "compare.md").read_text(encoding="utf-8")
    assert written.strip() in text
    sentences = {sentence for result in results for sentence in result["findings"]}
    for either in ("has the highest ROUGE-L|do not differ in ROUGE-L", "forgot the least"):
        assert sum(re.search(either, sentence) is not None for sentence in sentences) == 1
    assert all(f"- {sentence}" in written for sentence in sentences)
    assert json.loads((tmp_path / "all" / "lora" / "result.json").read_text())["mode"] == "lora"
