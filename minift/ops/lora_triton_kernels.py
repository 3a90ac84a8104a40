"""The kernels of the low-rank update in Triton; lora_triton.py launches them.

Sums over tokens are made in chunks, in fp32, and a second small reduction adds the chunks: no atomics, so the
numbers are the same every time. Dropout's mask is made in the kernels from the seed, and never stored. A and
B are cast where they are loaded. Products of fp32 are made in fp32: TF32 is not used.

Letters as in lora.py, with R for r, and J = P R: the columns of h. BM, BN, BK, BJ and BR are the sizes of
tiles. A stride is named after its tensor and dimension: stride_xm. Offsets in x, dy and the weight may need
64 bits.
"""

import os

import triton
import triton.language as tl

from minift.ops.dropout_triton import keep_tile, splitmix64

# The interpreter (TRITON_INTERPRET=1) multiplies bf16 wrongly and does not say so. There, tiles become fp32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load(pointers, mask, like):
    """A tile in the dtype of the products, that of the pointer `like`; 0 where the mask is False."""
    tile = tl.load(pointers, mask, other=0.0)
    return tile.to(tl.float32) if INTERPRETED else tile.to(like.dtype.element_ty)


@triton.jit
def shrink_kernel(
    x, a, h,  # (M, K), (J, K), (M, J)
    seed,
    M, K, J,
    stride_xm, stride_xk,
    stride_aj, stride_ak,
    stride_hm,
    c,
    threshold,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):
    """h = c drop(x) a^T."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    row_mask = rows < M
    j_mask = j < J
    acc = tl.zeros((BM, BJ), tl.float32)
    if DROPOUT:
        row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        k_mask = k < K
        x_pointers = x + rows[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        x_tile = load(x_pointers, row_mask[:, None] & k_mask[None, :], x)  # (BM, BK)
        if DROPOUT:
            column_numbers = splitmix64(seed, k0 // 4, tl.arange(0, BK // 4))
            keep = keep_tile(row_numbers, column_numbers, threshold, BM, BK)
            x_tile = tl.where(keep, x_tile, 0.0)
        a_pointers = a + k[:, None] * stride_ak + j[None, :] * stride_aj
        a_tile = load(a_pointers, k_mask[:, None] & j_mask[None, :], x)  # (BK, BJ)
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    h_pointers = h + rows[:, None] * stride_hm + j[None, :]
    h_tile = (acc * c).to(h.dtype.element_ty)
    tl.store(h_pointers, h_tile, row_mask[:, None] & j_mask[None, :])


@triton.jit
def add_update(
    acc,  # (BM, BN)
    h, b,  # (M, P R), (P n, R)
    like,
    rows, columns,  # (BM,), (BN,)
    first,
    M, n,
    stride_bn, stride_br,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):
    """acc + h_p b_p^T for every part p of which some of the n columns, from OFFSETS[p] on, are in this tile.
    `first` is the tile's first column."""
    row_mask = rows < M
    for p in tl.static_range(len(OFFSETS)):
        local = columns - OFFSETS[p]  # counted in the part
        local_mask = (local >= 0) & (local < n)
        if (first < OFFSETS[p] + n) & (first + BN > OFFSETS[p]):
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                r_mask = r < R
                h_pointers = h + rows[:, None] * (len(OFFSETS) * R) + (p * R + r)[None, :]
                h_tile = load(h_pointers, row_mask[:, None] & r_mask[None, :], like)  # (BM, BR)
                b_pointers = b + r[:, None] * stride_br + (p * n + local)[None, :] * stride_bn
                b_tile = load(b_pointers, r_mask[:, None] & local_mask[None, :], like)  # (BR, BN)
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
    stride_bn, stride_br,
    threshold,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x w^T + bias + keep * (h b^T). Programs take y in bands of GROUP tiles, so that tiles of x and w
    are still in the L2 cache when they are needed again."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = pid // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    in_band = pid % (GROUP * tiles_n)
    rows = (band * GROUP + in_band % height).to(tl.int64) * BM + tl.arange(0, BM)
    first = in_band // height * BN
    columns = first + tl.arange(0, BN)
    row_mask = rows < M
    column_mask = columns < N
    acc = tl.zeros((BM, BN), tl.float32)
    if DROPOUT:  # before the loop: a masked product after it would need registers for a second accumulator
        acc = add_update(acc, h, b, x, rows, columns, first, M, n, stride_bn, stride_br, OFFSETS, R, BN, BR)
        column_numbers = splitmix64(seed, first // 4, tl.arange(0, BN // 4))
        row_numbers = splitmix64(seed, tl.cdiv(N, 4), rows)
        keep = keep_tile(row_numbers, column_numbers, threshold, BM, BN)
        acc = tl.where(keep, acc, 0.0)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        k_mask = k < K
        x_pointers = x + rows[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        x_tile = load(x_pointers, row_mask[:, None] & k_mask[None, :], x)  # (BM, BK)
        w_pointers = w + k.to(tl.int64)[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
        w_tile = load(w_pointers, k_mask[:, None] & column_mask[None, :], x)  # (BK, BN)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    if not DROPOUT:  # after the loop: before it, its tiles and the loop's would be in memory together
        acc = add_update(acc, h, b, x, rows, columns, first, M, n, stride_bn, stride_br, OFFSETS, R, BN, BR)
    if BIAS:
        bias_tile = tl.load(bias + columns, column_mask, other=0.0)
        acc += bias_tile.to(tl.float32)[None, :]
    y_pointers = y + rows[:, None] * N + columns[None, :]
    y_tile = acc.to(y.dtype.element_ty)
    tl.store(y_pointers, y_tile, row_mask[:, None] & column_mask[None, :])


@triton.jit
def expand_kernel(
    dy,  # (M, N)
    b,  # (P n, R)
    h, g,  # (M, P R)
    db,  # (chunks, P n, R) in fp32
    M, n,
    stride_dm, stride_dn,
    stride_bn, stride_br,
    c,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):
    """From BM rows of dy, read once: g_p = c dy_p b_p, complete, and the part of dB_p = dy_p^T h_p that comes
    from these rows."""
    P: tl.constexpr = len(OFFSETS)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    p = tl.program_id(1)
    r = tl.arange(0, BR)
    offset = 0
    for i in tl.static_range(P):
        offset = tl.where(p == i, OFFSETS[i], offset)
    row_mask = rows < M
    r_mask = r < R
    h_offsets = rows[:, None] * (P * R) + (p * R + r)[None, :]  # in g too
    h_mask = row_mask[:, None] & r_mask[None, :]
    h_tile = load(h + h_offsets, h_mask, dy)  # (BM, BR)
    acc = tl.zeros((BM, BR), tl.float32)
    for n0 in range(0, n, BN):
        local = n0 + tl.arange(0, BN)
        local_mask = local < n
        columns = (offset + local).to(tl.int64)
        dy_pointers = dy + rows[:, None] * stride_dm + columns[None, :] * stride_dn
        dy_tile = load(dy_pointers, row_mask[:, None] & local_mask[None, :], dy)  # (BM, BN)
        b_mask = local_mask[:, None] & r_mask[None, :]
        b_pointers = b + (p * n + local)[:, None] * stride_bn + r[None, :] * stride_br
        b_tile = load(b_pointers, b_mask, dy)  # (BN, BR)
        acc = tl.dot(dy_tile, b_tile, acc, input_precision="ieee")
        db_tile = tl.dot(tl.trans(dy_tile), h_tile, input_precision="ieee")  # (BN, BR)
        db_rows = (tl.program_id(0).to(tl.int64) * P + p) * n + local
        tl.store(db + db_rows[:, None] * R + r[None, :], db_tile, b_mask)
    g_tile = (acc * c).to(g.dtype.element_ty)
    tl.store(g + h_offsets, g_tile, h_mask)


@triton.jit
def outer_kernel(
    x, g,  # (M, K), (M, J)
    da,  # (chunks, J, K) in fp32
    seed,
    M, K, J,
    stride_xm, stride_xk,
    stride_gm,
    threshold,
    DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):
    """The part of dA = g^T drop(x) that comes from CHUNK rows, a multiple of BM. It is made as drop(x)^T g:
    matrix instructions want the long side first."""
    first = tl.program_id(0) * BK
    k = first + tl.arange(0, BK)
    j = tl.program_id(2) * BJ + tl.arange(0, BJ)
    k_mask = k < K
    j_mask = j < J
    acc = tl.zeros((BK, BJ), tl.float32)
    if DROPOUT:
        column_numbers = splitmix64(seed, first // 4, tl.arange(0, BK // 4))
    for m0 in range(0, CHUNK, BM):
        rows = tl.program_id(1).to(tl.int64) * CHUNK + m0 + tl.arange(0, BM)
        row_mask = rows < M
        x_pointers = x + rows[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        x_tile = load(x_pointers, row_mask[:, None] & k_mask[None, :], x)  # (BM, BK)
        if DROPOUT:
            row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
            keep = keep_tile(row_numbers, column_numbers, threshold, BM, BK)
            x_tile = tl.where(keep, x_tile, 0.0)
        g_pointers = g + rows[:, None] * stride_gm + j[None, :]
        g_tile = load(g_pointers, row_mask[:, None] & j_mask[None, :], x)  # (BM, BJ)
        acc = tl.dot(tl.trans(x_tile), g_tile, acc, input_precision="ieee")
    da_rows = (tl.program_id(1) * J + j).to(tl.int64)
    da_pointers = da + da_rows[None, :] * K + k[:, None]
    tl.store(da_pointers, acc, k_mask[:, None] & j_mask[None, :])
