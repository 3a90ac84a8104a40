"""Dropout's mask in Triton, the same bits as in dropout.py. Imported only where Triton runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def splitmix64(seed, first, indices):
    """Outputs first + indices of splitmix64 in dropout.py. The first outputs are the numbers of the columns,
    one for four of them; then come the numbers of the rows."""
    z = tl.load(seed).to(tl.uint64) + (first + indices).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keep_tile(row_numbers, column_numbers, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """keep_mask of dropout.py for a tile: row_numbers (ROWS,), column_numbers (COLUMNS / 4,)."""
    z = row_numbers[:, None] * column_numbers[None, :]
    z = (z ^ (z.to(tl.int64) >> 32).to(tl.uint64)) * 0xBF58476D1CE4E5B9
    even = tl.join(z.to(tl.int16), (z >> 32).to(tl.int16))
    odd = tl.join((z >> 16).to(tl.int16), (z >> 48).to(tl.int16))
    bits = tl.join(even, odd)  # (ROWS, COLUMNS / 4, 2, 2)
    return tl.reshape(bits, (ROWS, COLUMNS)) > threshold


@triton.jit
def mask_kernel(
    keep,  # (M, K), contiguous
    seed,
    M, K,
    threshold,
    BM: tl.constexpr, BK: tl.constexpr,
):
    """Dropout's mask, stored: the PyTorch implementation uses it on a GPU."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    column_numbers = splitmix64(seed, first // 4, tl.arange(0, BK // 4))
    row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
    tile = keep_tile(row_numbers, column_numbers, threshold, BM, BK)
    inside = (rows < M)[:, None] & (k < K)[None, :]
    tl.store(keep + rows[:, None] * K + k[None, :], tile, inside)


def keep_mask(x: Tensor, threshold: int, seed: Tensor) -> Tensor:
    """The elements of x (M, K) that dropout keeps, as bools. `threshold` is drop_threshold(rate)."""
    (M, K), BM, BK = x.shape, 16, 256
    keep = torch.empty(M, K, dtype=torch.bool, device=x.device)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(M, BM), triton.cdiv(K, BK))
        mask_kernel[grid](keep, seed, M, K, threshold, BM=BM, BK=BK)
    return keep


def try_compiling(device: torch.device) -> None:
    """Compile the smallest kernel for a GPU, without running it. Raises Triton's errors."""
    with torch.cuda.device(device):
        mask_kernel.warmup(torch.bool, torch.int64, 64, 64, 0, BM=16, BK=64, grid=(1, 1))
