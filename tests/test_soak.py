"""A long run in one process does not collect memory, file handles or threads."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import json_of, step_losses, trained, write_pairs

import train as script
from minift.training import StepResult

STEPS, EVERY = 600, 25

pytestmark = pytest.mark.usefixtures("quick")


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def allocated_bytes() -> int:
    """Bytes that the process holds from malloc, as torch does. Not resident memory, which fragments and huge pages
    change; Python's small objects are counted apart."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def test_hundreds_of_steps_cost_no_memory(
    tmp_path: Path,
    make_reference: Callable[..., torch.nn.Module],
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With validation, both checkpoints and the log; the first half fills caches and is not counted."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later on Linux")
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
            samples.append((allocated_bytes(), sys.getallocatedblocks(), handles, threading.active_count()))
        return train_step(*arguments)

    monkeypatch.setattr(script, "train_step", step)
    options = f"--mode lora --steps {STEPS} --batch 2 --dropout 0.1 --eval-every {EVERY // 2} --patience 0"
    quick_options = "--dtype fp32 --device cpu --val-rows 2 --test-rows 2 --max-new-tokens 4 --rank 2"
    arguments = ["--model", tmp_path / "base", "--data", pairs, "--out", tmp_path / "x"]
    trained(*arguments, *options.split(), *quick_options.split())
    assert len(step_losses(tmp_path / "x")) == STEPS == json_of(tmp_path / "x" / "result.json")["steps"]

    memory, blocks, handles, threads = zip(*samples[len(samples) // 2 :], strict=True)
    assert len(set(handles)) == 1 and len(set(threads)) == 1
    counted = (len(memory) - 1) * EVERY
    assert memory[-1] - memory[0] < 50 * counted, f"bytes, a sample every {EVERY} steps: {memory}"
    assert blocks[-1] - blocks[0] < 0.8 * counted, f"Python's objects, a sample every {EVERY} steps: {blocks}"
