"""Memory grows with real tokens: not with rows times the longest times the vocabulary."""

import subprocess
import sys

import pytest
from scripts import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux",
                                reason="only Linux tells a process's peak anew for every step")
STEP = """
import sys
import torch
from minift import modes
from minift.device import peak_memory, reset_peak_memory, resident_memory
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Row
from minift.training import make_optimizer, train_step
torch.set_num_threads(1)
lengths, targets = eval(sys.argv[1]), int(sys.argv[2])
model = GPT(GPTConfig(n_embd=64, n_layer=2, n_head=4))
model.init_weights(0)
modes.apply(model, "full", modes.MODES["full"].Options())
optimizer = make_optimizer(model.train(), 1e-3, 0.0)
batch = [Row(torch.randint(50257, (n,)).tolist(), ((max(1, n - targets), n),)) for n in lengths]
device = torch.device("cpu")
for step in range(2):
    reset_peak_memory(device)
    before = resident_memory(device)
    loss, _ = train_step(model, [batch], 1.0).read()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert 0 < loss < 20
print(peak_memory(device) - before)
"""


def taken(lengths: str, targets: int) -> float:
    """MiB that a second step takes at its peak, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", STEP, lengths, str(targets)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 2**20


def test_long_rows_with_gpt2s_vocabulary() -> None:
    """8 rows of 1,024 tokens, every one a target: their logits alone would be 1,570 MiB in fp32, and their
    gradient as much again. A chunk of 256 tokens has 49 MiB of logits; the gradient of the embedding, which
    is the head, is 12 MiB, and what the blocks keep 16 KiB a token."""
    assert taken("[1024] * 8", 1023) < 500


def test_padding_takes_no_memory() -> None:
    """One long row among short ones: padded, the batch would have 25 times as many tokens."""
    ragged, padded = taken("[1024] + [9] * 31", 5), taken("[1024] * 32", 5)
    assert ragged < padded / 2  # 70 and 176 MiB, most of the first for the vocabulary
