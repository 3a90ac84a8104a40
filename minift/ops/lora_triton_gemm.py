"""The large products in Triton, with the low-rank update in their accumulators; lora_triton.py launches them.
Letters, names and rules as in lora_triton_kernels.py.
"""

import torch
import triton
import triton.language as tl

from minift.ops.dropout_triton import keep_tile, splitmix64
from minift.ops.lora_triton_kernels import load


@triton.jit
def add_update(
    acc,  # (BM, BN)
    h, b,  # (M, P R), (P n, R)
    rows, columns,  # (BM,), (BN,)
    first,
    M, n,
    stride_bn: tl.constexpr, stride_br: tl.constexpr,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):
    """acc (BM, BN) plus the h_p b_p^T of the parts whose columns, OFFSETS[p] to OFFSETS[p] + n, overlap with this tile.
    `first` is the first column of the tile."""
    row_mask = rows < M
    for p in tl.static_range(len(OFFSETS)):
        local = columns - OFFSETS[p]  # columns, counted from the start of the part
        local_mask = (local >= 0) & (local < n)
        # a tile that lies outside the part skips its products
        if (first < OFFSETS[p] + n) & (first + BN > OFFSETS[p]):
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                r_mask = r < R
                h_pointers = h + rows[:, None] * (len(OFFSETS) * R) + (p * R + r)[None, :]
                h_tile = load(h_pointers, row_mask[:, None] & r_mask[None, :])  # (BM, BR)
                b_pointers = b + r[:, None] * stride_br + (p * n + local)[None, :] * stride_bn
                b_tile = load(b_pointers, r_mask[:, None] & local_mask[None, :])  # (BR, BN)
                acc = tl.dot(h_tile, b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def gemm_kernel(
    x, w, bias,  # (M, K), (N, K), (N,)
    h, b,  # (M, P R), (P n, R)
    y,  # (M, N)
    seed,
    M, N, K, n,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    stride_bn: tl.constexpr, stride_br: tl.constexpr,
    threshold,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x w^T + bias + keep * (h b^T). Each program computes a tile (BM, BN) of y.

    Neighbouring programs work on a band of GROUP tiles in height, column after column. So the tiles of x and w are
    still in the L2 cache when the next program needs them.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = pid // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)  # the last band may have fewer tiles
    in_band = pid % (GROUP * tiles_n)
    rows = (band * GROUP + in_band % height).to(tl.int64) * BM + tl.arange(0, BM)
    first = in_band // height * BN
    columns = first + tl.arange(0, BN)
    row_mask = rows < M
    column_mask = columns < N
    acc = tl.zeros((BM, BN), tl.float32)
    if DROPOUT:  # before the loop: a masked product after it would need registers for a second accumulator
        acc = add_update(acc, h, b, rows, columns, first, M, n, stride_bn, stride_br, OFFSETS, R, BN, BR)
        column_numbers = splitmix64(seed, first // 4, tl.arange(0, BN // 4))
        row_numbers = splitmix64(seed, tl.cdiv(N, 4), rows)
        keep = keep_tile(row_numbers, column_numbers, threshold, BM, BN)
        acc = tl.where(keep, acc, 0.0)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        k_mask = k < K
        x_pointers = x + rows[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        x_tile = load(x_pointers, row_mask[:, None] & k_mask[None, :])  # (BM, BK)
        w_pointers = w + k.to(tl.int64)[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
        w_tile = load(w_pointers, k_mask[:, None] & column_mask[None, :])  # (BK, BN)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    if not DROPOUT:  # after the loop: before it, its tiles and the loop's would be in memory together
        acc = add_update(acc, h, b, rows, columns, first, M, n, stride_bn, stride_br, OFFSETS, R, BN, BR)
    if BIAS:
        bias_tile = tl.load(bias + columns, column_mask, other=0.0)
        acc += bias_tile.to(tl.float32)[None, :]
    y_pointers = y + rows[:, None] * N + columns[None, :]
    y_tile = acc.to(y.dtype.element_ty)
    tl.store(y_pointers, y_tile, row_mask[:, None] & column_mask[None, :])


def compile_small_product() -> None:
    """Compile gemm_kernel for the current GPU, with a dropout mask, and do not run it. Raises Triton's errors."""
    tensor, seed = torch.bfloat16, torch.int64
    sizes = dict(M=64, N=64, K=64, n=64)
    strides = dict(stride_xm=64, stride_xk=1, stride_wn=64, stride_wk=1, stride_bn=16, stride_br=1)
    constants = dict(OFFSETS=(0,), R=16, BIAS=True, DROPOUT=True, BM=64, BN=64, BK=32, BR=16, GROUP=8)
    gemm_kernel.warmup(tensor, tensor, tensor, tensor, tensor, tensor, seed, **sizes, **strides, threshold=0,
                       **constants, grid=(1,))
