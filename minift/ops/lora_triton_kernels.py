"""The thin kernels of the low-rank update in Triton: those that read x or dy once. The large products are in
lora_triton_gemm.py; lora_triton.py launches both.

Sums that several programs share are computed in parts, in fp32, and the parts are added afterwards in a fixed order.
Atomic additions would need no second step, but their order, and so the rounding, would change from run to run. The
dropout mask is computed in the kernels from the seed, and never stored. All factors of a product have the dtype of x.
Products of fp32 are computed in fp32: "ieee" switches TF32 off.

Letters as in lora.py, with R for r, and J = P R, the columns of h. BM, BN, BK, BJ and BR are the sizes of tiles. A
stride is named after its tensor and dimension: stride_xm. Offsets in x, dy and the weight may need 64 bits, so the
numbers of rows and columns are cast before they are multiplied. The strides of thin matrices are constants: with rank 8
a row has 16 bytes, and a kernel that does not know this loads one number at a time, and not while it multiplies.
"""

import os

import triton
import triton.language as tl

from minift.ops.dropout_triton import keep_tile, splitmix64

# Triton's interpreter (TRITON_INTERPRET=1) multiplies bf16 wrongly, without an error: there, tiles become fp32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load(pointers, mask):
    """A tile, with 0 where the mask is False."""
    tile = tl.load(pointers, mask, other=0.0)
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def shrink_kernel(
    x, a,  # (M, K), (J, K)
    h,  # (splits, M, J)
    x_copy,  # (M, K + padding of J), or None
    seed,
    M, K, J, length,
    stride_xm, stride_xk,
    stride_aj, stride_ak,
    stride_hs, stride_hm,
    stride_cm,
    c,
    threshold,
    DROPOUT: tl.constexpr, COPY: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):
    """h = c drop(x) a^T. Each program computes a tile (BM, BJ) of h: its sum over `length` inputs, a multiple of BK.
    With COPY it also writes x into the first K columns of x_copy."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * length
    j = tl.program_id(2) * BJ + tl.arange(0, BJ)
    row_mask = rows < M
    j_mask = j < J
    acc = tl.zeros((BM, BJ), tl.float32)
    if DROPOUT:
        row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
    for done in range(0, length, BK):
        k = first + done + tl.arange(0, BK)
        k_mask = k < K
        x_pointers = x + rows[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        x_mask = row_mask[:, None] & k_mask[None, :]
        x_tile = load(x_pointers, x_mask)  # (BM, BK)
        if COPY:
            if tl.program_id(2) == 0:
                copy_pointers = x_copy + rows[:, None] * stride_cm + k[None, :]
                tl.store(copy_pointers, x_tile.to(x_copy.dtype.element_ty), x_mask)
        if DROPOUT:
            column_numbers = splitmix64(seed, (first + done) // 4, tl.arange(0, BK // 4))
            keep = keep_tile(row_numbers, column_numbers, threshold, BM, BK)
            x_tile = tl.where(keep, x_tile, 0.0)
        a_pointers = a + k.to(tl.int64)[:, None] * stride_ak + j[None, :] * stride_aj
        a_tile = load(a_pointers, k_mask[:, None] & j_mask[None, :])  # (BK, BJ)
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    h_pointers = h + tl.program_id(1).to(tl.int64) * stride_hs + rows[:, None] * stride_hm + j[None, :]
    h_tile = (acc * c).to(h.dtype.element_ty)
    tl.store(h_pointers, h_tile, row_mask[:, None] & j_mask[None, :])


@triton.jit
def sum_kernel(
    parts,  # (splits, M, J) in fp32
    h,  # (M, J)
    x_copy,  # (M, K + padding of J), or None
    splits, M, K, J, padded_J,
    stride_hm,
    stride_cm,
    c,
    COPY: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr,
):
    """h = c times the sum of the parts. With COPY it is also written behind the K columns of x_copy, with zeros in the
    columns from J to padded_J."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    row_mask = rows < M
    mask = row_mask[:, None] & (j < J)[None, :]
    acc = tl.zeros((BM, BJ), tl.float32)
    for s in range(0, splits):
        part_pointers = parts + (rows + s * M)[:, None] * J + j[None, :]
        acc += tl.load(part_pointers, mask, other=0.0)
    h_tile = (acc * c).to(h.dtype.element_ty)
    tl.store(h + rows[:, None] * stride_hm + j[None, :], h_tile, mask)
    if COPY:
        copy_pointers = x_copy + rows[:, None] * stride_cm + K + j[None, :]
        tl.store(copy_pointers, h_tile, row_mask[:, None] & (j < padded_J)[None, :])


@triton.jit
def expand_kernel(
    dy,  # (M, N)
    b,  # (P n, R)
    h,  # (M, P R)
    g,  # (splits, M, P R)
    db,  # (chunks, P n, R) in fp32
    M, n, length,
    stride_dm, stride_dn,
    stride_bn: tl.constexpr, stride_br: tl.constexpr,
    c,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):
    """The parts of g_p = c dy_p b_p and dB_p = dy_p^T h_p that depend on BM rows and `length` columns of dy_p, with one
    read of dy. A program for every BM rows, every part p and every `length` columns, a multiple of BN."""
    P: tl.constexpr = len(OFFSETS)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    p = tl.program_id(1)
    first = tl.program_id(2) * length
    r = tl.arange(0, BR)
    offset = 0  # OFFSETS[p]: a tuple of constants cannot be indexed by the variable p
    for i in tl.static_range(P):
        offset = tl.where(p == i, OFFSETS[i], offset)
    row_mask = rows < M
    r_mask = r < R
    h_mask = row_mask[:, None] & r_mask[None, :]
    h_columns = (p * R + r)[None, :]
    h_tile = load(h + rows[:, None] * (P * R) + h_columns, h_mask)  # (BM, BR)
    acc = tl.zeros((BM, BR), tl.float32)
    for done in range(0, length, BN):
        local = first + done + tl.arange(0, BN)
        local_mask = local < n
        columns = (offset + local).to(tl.int64)
        dy_pointers = dy + rows[:, None] * stride_dm + columns[None, :] * stride_dn
        dy_tile = load(dy_pointers, row_mask[:, None] & local_mask[None, :])  # (BM, BN)
        b_mask = local_mask[:, None] & r_mask[None, :]
        b_pointers = b + (p * n + local)[:, None] * stride_bn + r[None, :] * stride_br
        b_tile = load(b_pointers, b_mask)  # (BN, BR)
        acc = tl.dot(dy_tile, b_tile, acc, input_precision="ieee")
        db_tile = tl.dot(tl.trans(dy_tile), h_tile, input_precision="ieee")  # (BN, BR)
        db_rows = (tl.program_id(0).to(tl.int64) * P + p) * n + local
        tl.store(db + db_rows[:, None] * R + r[None, :], db_tile, b_mask)
    g_rows = tl.program_id(2).to(tl.int64) * M + rows
    g_tile = (acc * c).to(g.dtype.element_ty)
    tl.store(g + g_rows[:, None] * (P * R) + h_columns, g_tile, h_mask)


@triton.jit
def outer_kernel(
    x, g,  # (M, K), (M, J)
    da,  # (chunks, J, K) in fp32
    seed,
    M, K, J,
    stride_xm, stride_xk,
    stride_gm: tl.constexpr,
    threshold,
    DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):
    """The summand of dA = g^T drop(x) of CHUNK rows, a multiple of BM. Computed as drop(x)^T g (BK, BJ): the first
    dimension of a matrix instruction is the long one, and BJ is short."""
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
        x_tile = load(x_pointers, row_mask[:, None] & k_mask[None, :])  # (BM, BK)
        if DROPOUT:
            row_numbers = splitmix64(seed, tl.cdiv(K, 4), rows)
            keep = keep_tile(row_numbers, column_numbers, threshold, BM, BK)
            x_tile = tl.where(keep, x_tile, 0.0)
        g_pointers = g + rows[:, None] * stride_gm + j[None, :]
        g_tile = load(g_pointers, row_mask[:, None] & j_mask[None, :])  # (BM, BJ)
        acc = tl.dot(tl.trans(x_tile), g_tile, acc, input_precision="ieee")
    da_rows = (tl.program_id(1) * J + j).to(tl.int64)
    da_pointers = da + da_rows[None, :] * K + k[:, None]
    tl.store(da_pointers, acc, k_mask[:, None] & j_mask[None, :])


@triton.jit
def sum_two_kernel(
    a_parts, a, a_count, a_size,  # (a_count, a_size), (a_size,)
    b_parts, b, b_count, b_size,  # (b_count, b_size), (b_size,)
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):
    """a = the sum of a_parts, and b = the sum of b_parts, all in fp32: two sums with one launch."""
    if tl.program_id(1) == 0:
        sum_block(a_parts, a, a_count, a_size, COUNT, BLOCK)
    else:
        sum_block(b_parts, b, b_count, b_size, COUNT, BLOCK)


@triton.jit
def sum_block(parts, total, count, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of the sum of `count` parts, COUNT parts at a time."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((COUNT, BLOCK), tl.float32)
    for first in range(0, count, COUNT):
        s = first + tl.arange(0, COUNT)
        pointers = parts + s.to(tl.int64)[:, None] * size + i[None, :]
        acc += tl.load(pointers, (s < count)[:, None] & (i < size)[None, :], other=0.0)
    tl.store(total + i, tl.sum(acc, 0), i < size)
