"""Dropout's mask in Triton, with the same bits as in dropout.py. Imported only where Triton runs.

Letters as in dropout.py. BM and BK are the sizes of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def splitmix64(seed, first, indices):
    """Outputs number `first + indices` of splitmix64 in dropout.py: 0 to W - 1 are the column numbers, one for every
    four columns, and W to W + M - 1 are the row numbers."""
    z = tl.load(seed).to(tl.uint64) + (first + indices).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keep_tile(row_numbers, column_numbers, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """keep_mask of dropout.py for a tile: row_numbers (ROWS,), column_numbers (COLUMNS / 4,) -> (ROWS, COLUMNS)."""
    z = row_numbers[:, None] * column_numbers[None, :]
    z = (z ^ (z.to(tl.int64) >> 32).to(tl.uint64)) * 0xBF58476D1CE4E5B9  # int64, as dropout.py's >> copies the sign
    # the four 16-bit parts of a word in the order in which they lie in memory; join puts them into new last dimensions
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
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # int64: rows * K may need more than 32 bits
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    column_numbers = splitmix64(seed, first // 4, tl.arange(0, BK // 4))
    row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
    tile = keep_tile(row_numbers, column_numbers, threshold, BM, BK)
    inside = (rows < M)[:, None] & (k < K)[None, :]
    tl.store(keep + rows[:, None] * K + k[None, :], tile, inside)


def keep_mask(x: Tensor, threshold: int, seed: Tensor) -> Tensor:
    """The elements of x (M, K) that dropout keeps, as bools. `threshold` is drop_threshold(rate)."""
    M, K = x.shape
    BM, BK = 16, 256
    keep = torch.empty(M, K, dtype=torch.bool, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, not on that of the tensors
        grid = (triton.cdiv(M, BM), triton.cdiv(K, BK))
        mask_kernel[grid](keep, seed, M, K, threshold, BM=BM, BK=BK)
    return keep
