"""A long run in one process does not collect memory, file handles or threads."""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import json_of, step_losses, trained, write_pairs

import train as script
from minift.training import StepResult

STEPS, EVERY = 1500, 60


pytestmark = pytest.mark.usefixtures("quick")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_thousands_of_steps_cost_no_memory(
    tmp_path: Path,
    make_reference: Callable[..., torch.nn.Module],
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With validation, both checkpoints and the log; the first quarter fills caches and is not counted."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc")
    tiny = {"vocab_size": 320, "eos_token_id": 0, "bos_token_id": 0, "n_embd": 8, "n_head": 2, "n_layer": 1}
    make_reference(**tiny).save_pretrained(tmp_path / "base")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "base" / name).write_bytes((tokenizer_folder / name).read_bytes())
    pairs = write_pairs(tmp_path / "pairs", rows=40)
    train_step, samples, steps = script.train_step, [], iter(range(STEPS))

    def step(*arguments: Any) -> StepResult:
        if next(steps) % EVERY == 0:
            gc.collect()
            handles = len(os.listdir("/proc/self/fd"))
            samples.append((resident_bytes(), handles, threading.active_count()))
        return train_step(*arguments)

    monkeypatch.setattr(script, "train_step", step)
    options = f"--mode lora --steps {STEPS} --batch 2 --dropout 0.1 --eval-every {EVERY // 2} --patience 0"
    quick_options = "--dtype fp32 --device cpu --val-rows 2 --test-rows 2 --max-new-tokens 4 --rank 2"
    arguments = ["--model", tmp_path / "base", "--data", pairs, "--out", tmp_path / "x"]
    trained(*arguments, *options.split(), *quick_options.split())
    assert len(step_losses(tmp_path / "x")) == STEPS == json_of(tmp_path / "x" / "result.json")["steps"]

    memory, handles, threads = (list(column) for column in zip(*samples[len(samples) // 4 :], strict=True))
    assert len(set(handles)) == 1 and len(set(threads)) == 1
    third = len(memory) // 3
    growth = sorted(memory[-third:])[third // 2] - sorted(memory[:third])[third // 2]
    assert growth < 2**20, f"{growth / STEPS:.0f} bytes a step: {memory}"
