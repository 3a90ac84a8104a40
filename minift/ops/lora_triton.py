"""The low-rank update as Triton kernels. minift/kernels.py imports this file where they will run.

Forward: `shrink_kernel` makes h = c drop(x) A^T, with c = scale / (1 - dropout), and `gemm_kernel` adds h B^T
in the accumulator of x W^T. Backward: `expand_kernel` makes g = c dy B and dB = dy^T h from one read of dy,
`outer_kernel` dA = g^T drop(x), and `gemm_kernel` dx = dy W + keep * (g A). Sums over tokens are made in
parts, in fp32, which a second small reduction adds up: no atomics, so the same numbers every time. Dropout's
mask is made in the kernels from a seed on the device, and never stored. A and B are cast where they are
loaded. Products of fp32 are made in fp32: TF32 is not used.

Letters as in minift/kernels.py, and J = parts * r: the columns of h. Every tensor comes with its own strides,
and those of x, dy and the weight may reach further than 32 bits count.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift.ops.lora import threshold
from minift.ops.register import operator

# The interpreter (TRITON_INTERPRET=1) multiplies bf16 wrongly without saying so: there, tiles become fp32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load(pointers, mask, like):
    """A tile in the dtype of the dots, that of the pointer `like`; 0 where the mask is false."""
    tile = tl.load(pointers, mask, other=0.0)
    return tile.to(tl.float32) if INTERPRETED else tile.to(like.dtype.element_ty)


@triton.jit
def splitmix64(seed, first, indices):
    """Outputs first + indices of the generator of minift/kernels.py. As random_bits there has them: from 0 on
    those of the columns, one for four, then those of the rows."""
    z = tl.load(seed).to(tl.uint64) + (first + indices).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keep_tile(of_rows, of_columns, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """keep_mask of minift/kernels.py for a tile: numbers of its rows (ROWS,) and words (COLUMNS / 4,)."""
    z = of_rows[:, None] * of_columns[None, :]
    z = (z ^ (z.to(tl.int64) >> 32).to(tl.uint64)) * 0xBF58476D1CE4E5B9
    even = tl.join(z.to(tl.int16), (z >> 32).to(tl.int16))
    odd = tl.join((z >> 16).to(tl.int16), (z >> 48).to(tl.int16))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS)) > threshold  # from (ROWS, COLUMNS / 4, 2, 2)


@triton.jit
def mask_kernel(out, seed, M, K, threshold, BM: tl.constexpr, BK: tl.constexpr):
    """Dropout's mask, stored: what the PyTorch implementation uses on a GPU."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    of_columns = splitmix64(seed, first // 4, tl.arange(0, BK // 4))
    keep = keep_tile(splitmix64(seed, tl.cdiv(K, 4), rows), of_columns, threshold, BM, BK)
    tl.store(out + rows[:, None] * K + k[None, :], keep, (rows < M)[:, None] & (k < K)[None, :])


@triton.jit
def shrink_kernel(x, a, h, seed, M, K, J, sxm, sxk, saj, sak, shm, c, threshold,
                  DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr):
    """h (M, J) = c drop(x) a^T, x (M, K), a (J, K)."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BM, BJ), tl.float32)
    if DROPOUT:
        of_rows = splitmix64(seed, tl.cdiv(K, 4), rows)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        xt = load(x + rows[:, None] * sxm + k.to(tl.int64)[None, :] * sxk,
                  (rows < M)[:, None] & (k < K)[None, :], x)
        if DROPOUT:
            of_columns = splitmix64(seed, k0 // 4, tl.arange(0, BK // 4))
            xt = tl.where(keep_tile(of_rows, of_columns, threshold, BM, BK), xt, 0.0)
        at = load(a + k[:, None] * sak + j[None, :] * saj, (k < K)[:, None] & (j < J)[None, :], x)
        acc = tl.dot(xt, at, acc, input_precision="ieee")
    tl.store(h + rows[:, None] * shm + j[None, :], (acc * c).to(h.dtype.element_ty),
             (rows < M)[:, None] & (j < J)[None, :])


@triton.jit
def add_update(acc, h, b, like, rows, columns, first, M, n, sbn, sbr, OFFSETS: tl.constexpr, R: tl.constexpr,
               BN: tl.constexpr, BR: tl.constexpr):
    """acc + h_p b_p^T for every part p whose n columns, from OFFSETS[p] on, meet this tile's."""
    for p in tl.static_range(len(OFFSETS)):
        local = columns - OFFSETS[p]
        inside = (local >= 0) & (local < n)
        if (first < OFFSETS[p] + n) & (first + BN > OFFSETS[p]):
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                ht = load(h + rows[:, None] * (len(OFFSETS) * R) + (p * R + r)[None, :],
                          (rows < M)[:, None] & (r < R)[None, :], like)
                bt = load(b + r[:, None] * sbr + (p * n + local)[None, :] * sbn,
                          (r < R)[:, None] & inside[None, :], like)
                acc = tl.dot(ht, bt, acc, input_precision="ieee")
    return acc


@triton.jit
def gemm_kernel(x, w, bias, h, b, y, seed, M, N, K, n, sxm, sxk, swn, swk, sbn, sbr, threshold,
                OFFSETS: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr):
    """y (M, N) = x w^T + bias + keep * (h b^T), x (M, K), w (N, K), b (parts * n, R). Programs go through y
    in bands of GROUP tiles, so that tiles of x and w are still in the L2 cache when they are needed again."""
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = pid // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    rows = (band * GROUP + pid % (GROUP * tiles_n) % height).to(tl.int64) * BM + tl.arange(0, BM)
    first = pid % (GROUP * tiles_n) // height * BN
    columns = first + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if DROPOUT:  # before the loop: a masked product after it would need registers for a second accumulator
        acc = add_update(acc, h, b, x, rows, columns, first, M, n, sbn, sbr, OFFSETS, R, BN, BR)
        of_columns = splitmix64(seed, first // 4, tl.arange(0, BN // 4))
        keep = keep_tile(splitmix64(seed, tl.cdiv(N, 4), rows), of_columns, threshold, BM, BN)
        acc = tl.where(keep, acc, 0.0)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        xt = load(x + rows[:, None] * sxm + k.to(tl.int64)[None, :] * sxk,
                  (rows < M)[:, None] & (k < K)[None, :], x)
        wt = load(w + k.to(tl.int64)[:, None] * swk + columns.to(tl.int64)[None, :] * swn,
                  (k < K)[:, None] & (columns < N)[None, :], x)
        acc = tl.dot(xt, wt, acc, input_precision="ieee")
    if not DROPOUT:  # after the loop: before it, its tiles and the loop's would share the memory
        acc = add_update(acc, h, b, x, rows, columns, first, M, n, sbn, sbr, OFFSETS, R, BN, BR)
    if BIAS:
        acc += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + columns[None, :], acc.to(y.dtype.element_ty),
             (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def expand_kernel(dy, b, h, g, db, M, n, sdm, sdn, sbn, sbr, c, OFFSETS: tl.constexpr, R: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """From BM rows of dy, read once: g_p = c dy_p b_p, whole, and this chunk's share of dB_p = dy_p^T h_p.
    g, h (M, J); db (chunks, parts * n, R) in fp32."""
    P: tl.constexpr = len(OFFSETS)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    p = tl.program_id(1)
    r = tl.arange(0, BR)
    offset = 0
    for i in tl.static_range(P):
        offset = tl.where(p == i, OFFSETS[i], offset)
    of_h = rows[:, None] * (P * R) + (p * R + r)[None, :]
    inside = (rows < M)[:, None] & (r < R)[None, :]
    ht = load(h + of_h, inside, dy)
    acc = tl.zeros((BM, BR), tl.float32)
    for n0 in range(0, n, BN):
        local = n0 + tl.arange(0, BN)
        dt = load(dy + rows[:, None] * sdm + (offset + local).to(tl.int64)[None, :] * sdn,
                  (rows < M)[:, None] & (local < n)[None, :], dy)
        of_b = (local < n)[:, None] & (r < R)[None, :]
        bt = load(b + (p * n + local)[:, None] * sbn + r[None, :] * sbr, of_b, dy)
        acc = tl.dot(dt, bt, acc, input_precision="ieee")
        share = tl.dot(tl.trans(dt), ht, input_precision="ieee")  # (BN, BR)
        chunk = (tl.program_id(0).to(tl.int64) * P + p) * n + local
        tl.store(db + chunk[:, None] * R + r[None, :], share, of_b)
    tl.store(g + of_h, (acc * c).to(g.dtype.element_ty), inside)


@triton.jit
def outer_kernel(x, g, da, seed, M, K, J, sxm, sxk, sgm, threshold, DROPOUT: tl.constexpr,
                 CHUNK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr):
    """A chunk's share of dA = g^T drop(x), made as drop(x)^T g: matrix instructions want the long side first.
    da (chunks, J, K) in fp32; a chunk is CHUNK rows, a multiple of BM."""
    first = tl.program_id(0) * BK
    k = first + tl.arange(0, BK)
    j = tl.program_id(2) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BK, BJ), tl.float32)
    if DROPOUT:
        of_columns = splitmix64(seed, first // 4, tl.arange(0, BK // 4))
    for m0 in range(0, CHUNK, BM):
        rows = tl.program_id(1).to(tl.int64) * CHUNK + m0 + tl.arange(0, BM)
        xt = load(x + rows[:, None] * sxm + k.to(tl.int64)[None, :] * sxk,
                  (rows < M)[:, None] & (k < K)[None, :], x)
        if DROPOUT:
            of_rows = splitmix64(seed, tl.cdiv(K, 4), rows)
            xt = tl.where(keep_tile(of_rows, of_columns, threshold, BM, BK), xt, 0.0)
        gt = load(g + rows[:, None] * sgm + j[None, :], (rows < M)[:, None] & (j < J)[None, :], x)
        acc = tl.dot(tl.trans(xt), gt, acc, input_precision="ieee")
    row = (tl.program_id(1) * J + j).to(tl.int64)
    tl.store(da + row[None, :] * K + k[:, None], acc, (k < K)[:, None] & (j < J)[None, :])


# Tiles are fixed, so that a shape always gives the same numbers. They compile for sm_80 and sm_90 within
# the shared memory and without spills (tests/test_triton.py; with more shapes: python tests/aot.py --all).

def gemm_tiles(dtype: torch.dtype, M: int, N: int, K: int, rank: int, dropout: float) -> dict[str, int]:
    """Smaller where registers are short: for odd shapes, loaded element by element, and the mask."""
    if dtype == torch.float32 or N % 16 or K % 16:
        return dict(BM=64, BN=64, BK=32, num_warps=8, num_stages=2)
    wide = M * N >= 2**22 and rank <= 64 and not dropout
    return dict(BM=128, BN=256 if wide else 128, BK=64, num_warps=8, num_stages=3)


def rank_tile(rank: int, dtype: torch.dtype) -> int:
    """Columns of h that a program takes: the rank, at least a dot's 16, and at most 64 (fp32: 32)."""
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(rank)))


def shrink(x: Tensor, A: Tensor, c: float, dropout: float, seed: Tensor | None, h: Tensor) -> None:
    """h (M, J), its columns side by side, becomes c drop(x) A^T."""
    (M, K), J, wide = x.shape, len(A), x.dtype == torch.float32
    BJ = rank_tile(J, x.dtype)
    shrink_kernel[(triton.cdiv(M, 64), triton.cdiv(J, BJ))](
        x, A, h, seed, M, K, J, *x.stride(), *A.stride(), h.stride(0), c, threshold(dropout),
        DROPOUT=dropout > 0, BM=64, BK=32 if wide else 64, BJ=BJ, num_warps=8 if wide else 4,
        num_stages=2 if wide else 3)


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, offsets: tuple[int, ...],
         dropout: float, seed: Tensor | None) -> Tensor:
    """x weight^T + bias + keep * (h_p B_p^T at offset p for every part p), (M, N)."""
    (M, K), N, rank = x.shape, len(weight), B.shape[1]
    y, tiles = x.new_empty(M, N), gemm_tiles(x.dtype, M, N, K, rank, dropout)
    gemm_kernel[(triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"]),)](
        x, weight, bias, h, B, y, seed, M, N, K, len(B) // len(offsets), *x.stride(), *weight.stride(),
        *B.stride(), threshold(dropout), OFFSETS=offsets, R=rank, BIAS=bias is not None, DROPOUT=dropout > 0,
        BR=rank_tile(rank, x.dtype), GROUP=8, **tiles)
    return y


def outer(x: Tensor, g: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """g^T drop(x), (J, K) in fp32, from some 256 programs: each takes a chunk of the tokens."""
    (M, K), J, wide = x.shape, g.shape[1], x.dtype == torch.float32
    BM, BK, BJ = 32 if wide else 64, 64 if wide else 128, rank_tile(J, x.dtype)
    programs = triton.cdiv(K, BK) * triton.cdiv(J, BJ)
    CHUNK = triton.next_power_of_2(max(BM, triton.cdiv(M * programs, 256)))
    chunks = triton.cdiv(M, CHUNK)
    da = x.new_empty(chunks, J, K, dtype=torch.float32)
    outer_kernel[(triton.cdiv(K, BK), chunks, triton.cdiv(J, BJ))](
        x, g, da, seed, M, K, J, *x.stride(), g.stride(0), threshold(dropout), DROPOUT=dropout > 0,
        CHUNK=CHUNK, BM=BM, BK=BK, BJ=BJ, num_warps=8 if wide or BJ == 64 else 4,
        num_stages=2 if wide else 3)
    return da.sum(0)


def expand(dy: Tensor, B: Tensor, h: Tensor, offsets: tuple[int, ...], c: float) -> tuple[Tensor, Tensor]:
    """g = c dy_p B_p for every part p, (M, J), and dB = dy_p^T h_p in fp32, like B.

    Reading dy once costs a share of dB for every BM rows, written and read: 8 r / BM bytes beside each two of
    dy. Above rank 32 that is more than to read dy twice, so there it is done by shrink and outer.
    """
    M, P, rank, g = len(dy), len(offsets), B.shape[1], torch.empty_like(h)
    n = len(B) // P
    if rank > 32:
        parts = zip(offsets, B.chunk(P), g.chunk(P, 1), h.chunk(P, 1), strict=True)
        dB = []
        for start, b, g_part, h_part in parts:
            dy_part = dy[:, start : start + n]
            shrink(dy_part, b.T, c, 0.0, None, g_part)
            dB.append(outer(dy_part, h_part, 0.0, None).T)
        return g, torch.cat(dB)
    BM = 64 if dy.dtype == torch.float32 else 128
    chunks = triton.cdiv(M, BM)
    db = dy.new_empty(chunks, *B.shape, dtype=torch.float32)
    expand_kernel[(chunks, P)](
        dy, B, h, g, db, M, n, *dy.stride(), *B.stride(), c, OFFSETS=offsets, R=rank, BM=BM,
        BN=32 if dy.dtype == torch.float32 else 64, BR=rank_tile(rank, dy.dtype), num_warps=8, num_stages=2)
    return g, db.sum(0)


def keep_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    with torch.cuda.device_of(x):
        mask_kernel[(triton.cdiv(len(x), 16), triton.cdiv(x.shape[1], 256))](
            keep, seed, *x.shape, threshold(dropout), BM=16, BK=256)
    return keep


def try_compiling(device: torch.device) -> None:
    """Compile the smallest kernel for a GPU, without running it. Raises what Triton raises."""
    with torch.cuda.device(device):
        mask_kernel.warmup(torch.bool, torch.int64, 64, 64, 0, BM=16, BK=64, grid=(1, 1))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, offsets: list[int],
            scale: float, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (M, N) and h (M, J), which the backward pass needs."""
    with torch.cuda.device_of(x):
        h = x.new_empty(len(x), len(A))
        shrink(x, A, scale / (1 - dropout), dropout, seed, h)
        return gemm(x, weight, bias, h, B, tuple(offsets), 0.0, None), h


def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, offsets: list[int],
             scale: float, dropout: float, seed: Tensor | None, need_dx: bool
             ) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K), or an empty tensor without `need_dx`, dA and dB."""
    with torch.cuda.device_of(x):
        g, dB = expand(dy, B, h, tuple(offsets), scale / (1 - dropout))
        dA = outer(x, g, dropout, seed)
        dx = gemm(dy, weight.T, None, g, A.T, (0,), dropout, seed) if need_dx else x.new_empty(0)
        return dx, dA.to(A.dtype), dB.to(B.dtype)


def fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(A))


def fake_backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
                  ) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if rest[-1] else 0), torch.empty_like(A), torch.empty_like(B)


def forward_flops(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *_: Any) -> int:
    """x W^T, drop(x) A^T and h B^T."""
    return 2 * len(x) * (weight.numel() + A.numel() + B.numel())


def backward_flops(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any) -> int:
    """dy B, dy^T h and g^T drop(x), and for dx dy W and g A."""
    dx = weight.numel() + A.numel() if rest[-1] else 0
    return 2 * len(x) * (dx + A.numel() + 2 * B.numel())


lora_forward = operator("lora_forward", forward, fake_forward, forward_flops)
lora_backward = operator("lora_backward", backward, fake_backward, backward_flops)
