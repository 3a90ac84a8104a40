"""The two kernels of the hybrid, which leaves the large products to cuBLAS: see lora_triton.py. Imported only where
Triton runs. Letters, names and rules as in lora_triton_kernels.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift.ops.dropout import drop_threshold
from minift.ops.dropout_triton import keep_tile, splitmix64
from minift.ops.lora_triton_kernels import load
from minift.ops.lora_triton_tiles import rank_tile


def augmented_width(K: int, J: int) -> int:
    """The columns of [x, h]: J is padded to 8, as cuBLAS's fast kernels need rows of a multiple of 16 bytes."""
    return K + triton.cdiv(J, 8) * 8


def augment(weight: Tensor, B: Tensor, offsets: tuple[int, ...], width: int) -> Tensor:
    """[W, B_blocks] (N, width), zeros elsewhere.

    It is made anew in every forward pass and freed after its product: a copy of 2 N K bytes of one layer at a time. To
    keep it would double the memory of the frozen weights, and it would have to follow every change of the weight
    (merging, loading, FSDP's shards). For that, W is read and written once more: 4 N K bytes, where PyTorch's update
    reads and writes y once more for each part, 4 M N bytes in all.
    """
    N, K = weight.shape
    wide = weight.new_empty(N, width)
    BN, BK = 32, 64 if K % 16 else 128  # as in `shrink`
    augment_kernel[(triton.cdiv(N, BN), triton.cdiv(width, BK))](
        weight, B,
        wide,
        N, K, len(B) // len(offsets), width,
        weight.stride(0), weight.stride(1),
        B.stride(0), B.stride(1),
        OFFSETS=offsets, R=B.shape[1],
        BN=BN, BK=BK, num_warps=8,
    )
    return wide


def add_update(dx: Tensor, g: Tensor, A: Tensor, dropout: float, seed: Tensor | None) -> None:
    """dx (M, K) += keep * (g A), in place."""
    M, K = dx.shape
    BM, BK = (32, 64) if dx.dtype == torch.float32 else (64, 128)
    add_kernel[(triton.cdiv(M, BM), triton.cdiv(K, BK))](
        dx,
        g, A,
        seed,
        M, K,
        A.stride(0), A.stride(1),
        drop_threshold(dropout),
        J=len(A), DROPOUT=dropout > 0,
        BM=BM, BK=BK, BJ=rank_tile(len(A), dx.dtype),
        num_warps=8, num_stages=2,
    )


@triton.jit
def augment_kernel(
    w, b,  # (N, K), (P n, R)
    wide,  # (N, K + padding of P R), contiguous
    N, K, n, width,
    stride_wn, stride_wk,
    stride_bn: tl.constexpr, stride_br: tl.constexpr,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):
    """wide = [w, blocks of b]: column K + p R + r has column r of b_p in the rows of part p, and zeros elsewhere.
    `width` is K + padding of P R."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * BK
    columns = first + tl.arange(0, BK)
    row_mask = rows < N
    w_pointers = w + rows[:, None] * stride_wn + columns.to(tl.int64)[None, :] * stride_wk
    tile = load(w_pointers, row_mask[:, None] & (columns < K)[None, :])  # (BN, BK)
    if first + BK > K:
        for p in tl.static_range(len(OFFSETS)):
            local = rows - OFFSETS[p]  # rows and columns, counted from the start of the part
            r = columns - K - p * R
            local_mask = (local >= 0) & (local < n)
            r_mask = (r >= 0) & (r < R)
            b_pointers = b + (p * n + local)[:, None] * stride_bn + r[None, :] * stride_br
            tile += load(b_pointers, local_mask[:, None] & r_mask[None, :])
    wide_pointers = wide + rows[:, None] * width + columns[None, :]
    tl.store(wide_pointers, tile.to(wide.dtype.element_ty), row_mask[:, None] & (columns < width)[None, :])


@triton.jit
def add_kernel(
    dx,  # (M, K), contiguous
    g, a,  # (M, J), (J, K)
    seed,
    M, K,
    stride_aj, stride_ak,
    threshold,
    J: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):
    """dx += keep * (g a), in place. Each program computes a tile (BM, BK) of dx."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    row_mask = rows < M
    k_mask = k < K
    acc = tl.zeros((BM, BK), tl.float32)
    for j0 in range(0, J, BJ):
        j = j0 + tl.arange(0, BJ)
        j_mask = j < J
        g_tile = load(g + rows[:, None] * J + j[None, :], row_mask[:, None] & j_mask[None, :])  # (BM, BJ)
        a_pointers = a + j[:, None] * stride_aj + k[None, :] * stride_ak
        a_tile = load(a_pointers, j_mask[:, None] & k_mask[None, :])  # (BJ, BK)
        acc = tl.dot(g_tile, a_tile, acc, input_precision="ieee")
    if DROPOUT:
        column_numbers = splitmix64(seed, first // 4, tl.arange(0, BK // 4))
        row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
        acc = tl.where(keep_tile(row_numbers, column_numbers, threshold, BM, BK), acc, 0.0)
    dx_pointers = dx + rows[:, None] * K + k[None, :]
    mask = row_mask[:, None] & k_mask[None, :]
    acc += load(dx_pointers, mask).to(tl.float32)
    tl.store(dx_pointers, acc.to(dx.dtype.element_ty), mask)
