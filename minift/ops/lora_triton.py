"""The low-rank update in Triton: the launches and the two operators. Imported only where Triton runs.

kernel "triton", where the update is added in the accumulator of the large product:
Forward:   shrink  h = c drop(x) A^T, with c = s / (1 - dropout)
           gemm    y = x W^T + b + h B^T
Backward:  expand  g = c dy B and dB = dy^T h, from one read of dy
           outer   dA = g^T drop(x)
           gemm    dx = dy W + keep * (g A); keep is the mask of the dropout

kernel "persistent": the same with a persistent kernel for the large products (Hopper), without dropout's mask

kernel "hybrid", where cuBLAS computes the large products:
Forward:   shrink  h, and a copy [x, h] (M, K + J)
           augment [W, B_blocks] (N, K + J), with B_p in the rows of part p and the columns of h_p
           cuBLAS  y = [x, h] [W, B_blocks]^T + b = x W^T + h B^T + b
Backward:  expand and outer as above
           cuBLAS  dx = dy W
           add     dx += keep * (g A), in place

All tensors have the dtype of x; the gradients of A and B are in fp32. Letters as in lora.py, and J = P r, the columns
of h.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from minift.ops import register_op
from minift.ops.dropout import drop_threshold
from minift.ops.lora_triton_gemm import gemm_kernel
from minift.ops.lora_triton_hybrid import add_update, augment, augmented_width
from minift.ops.lora_triton_kernels import (
    expand_kernel,
    outer_kernel,
    shrink_kernel,
    sum_kernel,
    sum_two_kernel,
)
from minift.ops.lora_triton_persistent import is_possible, persistent_gemm
from minift.ops.lora_triton_tiles import gemm_tiles, gpu_of, rank_tile, split_length


def shrink(x: Tensor, A: Tensor, c: float, dropout: float, seed: Tensor | None, h: Tensor,
           x_copy: Tensor | None = None) -> None:
    """h (M, J) <- c drop(x) A^T. The columns of h must be contiguous in each row. x_copy (M, K + J padded) <- [x, h],
    with zeros in the padding."""
    M, K = x.shape
    J = len(A)
    BJ = rank_tile(J, x.dtype)
    if x.dtype == torch.float32 or K % 16:  # as in gemm_tiles, such a K takes registers for addresses
        tiles = dict(BM=32, BK=32, BJ=BJ, num_warps=8, num_stages=2)
    else:
        tiles = dict(BM=64, BK=64, BJ=BJ, num_warps=4, num_stages=5)
    tiles_m, tiles_j = triton.cdiv(M, tiles["BM"]), triton.cdiv(J, BJ)
    length = split_length(gpu_of(x.device), K, tiles["BK"], tiles_m * tiles_j)
    splits = triton.cdiv(K, length)
    in_parts = splits > 1 or x_copy is not None  # sum_kernel is the one that writes h into x_copy
    target = x.new_empty(splits, M, J, dtype=torch.float32) if in_parts else h[None]
    shrink_kernel[(tiles_m, splits, tiles_j)](
        x, A,
        target,
        x_copy,
        seed,
        M, K, J, length,
        x.stride(0), x.stride(1),
        A.stride(0), A.stride(1),
        target.stride(0), target.stride(1),
        x_copy.stride(0) if x_copy is not None else 0,
        1.0 if in_parts else c,
        drop_threshold(dropout),
        DROPOUT=dropout > 0, COPY=x_copy is not None,
        **tiles,
    )
    if in_parts:
        add_up(target, c, h, K, x_copy)


def add_up(parts: Tensor, c: float, h: Tensor, K: int = 0, x_copy: Tensor | None = None) -> None:
    """h (M, J) <- c times the sum of the parts (splits, M, J), in their order; and into x_copy behind its K columns."""
    splits, M, J = parts.shape
    BM = 32
    BJ = rank_tile(J, h.dtype)
    sum_kernel[(triton.cdiv(M, BM), triton.cdiv(J, BJ))](
        parts,
        h,
        x_copy,
        splits, M, K, J,
        x_copy.shape[1] - K if x_copy is not None else J,
        h.stride(0),
        x_copy.stride(0) if x_copy is not None else 0,
        c,
        COPY=x_copy is not None,
        BM=BM, BJ=BJ,
    )


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, offsets: tuple[int, ...],
         dropout: float, seed: Tensor | None) -> Tensor:
    """(M, N): x weight^T + bias, plus keep * (h_p B_p^T) in the columns of every part p."""
    M, K = x.shape
    N = len(weight)
    n, rank = len(B) // len(offsets), B.shape[1]
    y = x.new_empty(M, N)
    tiles = gemm_tiles(gpu_of(x.device), x.dtype, M, N, K, rank, dropout)
    grid = (triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"]),)  # one dimension: the kernel orders the tiles
    gemm_kernel[grid](
        x, weight, bias,
        h, B,
        y,
        seed,
        M, N, K, n,
        x.stride(0), x.stride(1),
        weight.stride(0), weight.stride(1),
        B.stride(0), B.stride(1),
        drop_threshold(dropout),
        OFFSETS=offsets, R=rank,
        BIAS=bias is not None, DROPOUT=dropout > 0,
        BR=rank_tile(rank, x.dtype) if rank <= 64 else 32,  # the loop over a large rank needs registers
        GROUP=8,
        **tiles,
    )
    return y


def product(kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor,
            offsets: tuple[int, ...]) -> Tensor:
    """x weight^T + bias, plus h_p B_p^T in the columns of every part p. h has the dropout already."""
    if kernel == "persistent" and is_possible(x, weight):
        return persistent_gemm(x, weight, bias, h, B, offsets)
    return gemm(x, weight, bias, h, B, offsets, 0.0, None)


def outer(x: Tensor, g: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """The summands (chunks, J, K) of g^T drop(x), in fp32."""
    M, K = x.shape
    J = g.shape[1]
    BJ = rank_tile(J, x.dtype)
    if x.dtype == torch.float32:
        tiles = dict(BM=32, BK=64, BJ=BJ, num_warps=8, num_stages=2)
    else:
        tiles = dict(BM=64, BK=128, BJ=BJ, num_warps=8 if BJ == 64 else 4, num_stages=3)
    # The output is small, so its tiles alone would leave most of the GPU idle. The M tokens are split into chunks of
    # CHUNK, for some 256 programs in all; each writes its own sum.
    tiles_k, tiles_j = triton.cdiv(K, tiles["BK"]), triton.cdiv(J, BJ)
    chunk_rows = max(tiles["BM"], triton.cdiv(M * tiles_k * tiles_j, 256))
    CHUNK = triton.next_power_of_2(chunk_rows)  # a multiple of BM; few values, as each is compiled anew
    chunks = triton.cdiv(M, CHUNK)
    da = x.new_empty(chunks, J, K, dtype=torch.float32)
    outer_kernel[(tiles_k, chunks, tiles_j)](
        x, g,
        da,
        seed,
        M, K, J,
        x.stride(0), x.stride(1),
        g.stride(0),
        drop_threshold(dropout),
        DROPOUT=dropout > 0,
        CHUNK=CHUNK,
        **tiles,
    )
    return da


def expand(dy: Tensor, B: Tensor, h: Tensor, offsets: tuple[int, ...], c: float) -> tuple[Tensor, Tensor]:
    """g = c dy_p B_p for every part p, (M, J), and the summands (chunks, P n, r) of dB = dy_p^T h_p in fp32."""
    M, parts, rank = len(dy), len(offsets), B.shape[1]
    n = len(B) // parts
    # One read of dy has a price: every program writes a dB of its own BM rows, which is read again for the sum. That is
    # 8 r / BM bytes for each two bytes of dy, and above rank 32 more than a second read of dy.
    if rank > 32:
        return expand_in_two(dy, B, h, offsets, c)
    if dy.dtype == torch.float32:
        BM, BN, stages = 64, 32, 2
    else:
        BM, BN, stages = 128, 64, 4
    chunks = triton.cdiv(M, BM)
    length = split_length(gpu_of(dy.device), n, BN, chunks * parts)
    splits = triton.cdiv(n, length)
    g = torch.empty_like(h)
    target = dy.new_empty(splits, *h.shape, dtype=torch.float32) if splits > 1 else g
    db = dy.new_empty(chunks, *B.shape, dtype=torch.float32)
    expand_kernel[(chunks, parts, splits)](
        dy,
        B,
        h,
        target,
        db,
        M, n, length,
        dy.stride(0), dy.stride(1),
        B.stride(0), B.stride(1),
        1.0 if splits > 1 else c,
        OFFSETS=offsets, R=rank,
        BM=BM, BN=BN, BR=rank_tile(rank, dy.dtype),
        num_warps=8, num_stages=stages,
    )
    if splits > 1:
        add_up(target, c, g)
    return g, db


def expand_in_two(dy: Tensor, B: Tensor, h: Tensor, offsets: tuple[int, ...], c: float
                  ) -> tuple[Tensor, Tensor]:
    """`expand` with two reads of dy: g by `shrink`, dB by `outer`."""
    parts = len(offsets)
    n = len(B) // parts
    g = torch.empty_like(h)
    B_parts, g_parts, h_parts = B.chunk(parts), g.chunk(parts, 1), h.chunk(parts, 1)
    dB = []
    for p, start in enumerate(offsets):
        dy_part = dy[:, start : start + n]
        shrink(dy_part, B_parts[p].T, c, 0.0, None, g_parts[p])  # g_p = c dy_p B_p
        dB.append(outer(dy_part, h_parts[p], 0.0, None).sum(0).T)  # h_p^T dy_p, transposed
    return g, torch.cat(dB)[None]


def add_two(a_parts: Tensor, b_parts: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the first dimension of two tensors in fp32."""
    a, b = (parts.new_empty(parts.shape[1:]) for parts in (a_parts, b_parts))
    BLOCK = 128
    sum_two_kernel[(triton.cdiv(max(a.numel(), b.numel()), BLOCK), 2)](
        a_parts, a, len(a_parts), a.numel(),
        b_parts, b, len(b_parts), b.numel(),
        COUNT=16, BLOCK=BLOCK,
    )
    return a, b


# ---- the two operators

# The type of an operator's argument cannot be a tuple of settings, so they take the fields of lora.Update one by one.

def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, offsets: list[int],
            scale: float, dropout: float, seed: Tensor | None, kernel: str) -> tuple[Tensor, Tensor]:
    """y (M, N) and h (M, J), which the backward pass needs."""
    with torch.cuda.device_of(x):
        h = x.new_empty(len(x), len(A))
        c = scale / (1 - dropout)
        if kernel == "hybrid":
            x_copy = x.new_empty(len(x), augmented_width(x.shape[1], len(A)))
            shrink(x, A, c, dropout, seed, h, x_copy)
            wide = augment(weight, B, tuple(offsets), x_copy.shape[1])
            y = torch.mm(x_copy, wide.T) if bias is None else torch.addmm(bias, x_copy, wide.T)
        else:
            shrink(x, A, c, dropout, seed, h)
            y = product(kernel, x, weight, bias, h, B, tuple(offsets))
        return y, h


def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, offsets: list[int],
             scale: float, dropout: float, seed: Tensor | None, need_dx: bool, kernel: str
             ) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K), or an empty tensor without `need_dx`, and dA and dB in fp32."""
    with torch.cuda.device_of(x):
        g, db = expand(dy, B, h, tuple(offsets), scale / (1 - dropout))
        da = outer(x, g, dropout, seed)
        dA, dB = add_two(da, db)
        if not need_dx:
            dx = x.new_empty(0)
        elif kernel == "hybrid" or kernel == "persistent" and dropout:
            dx = torch.mm(dy, weight)
            add_update(dx, g, A, dropout, seed)
        elif dropout:
            dx = gemm(dy, weight.T, None, g, A.T, (0,), dropout, seed)
        else:  # it has the form of y = x W^T + h B^T, with a single part
            dx = product(kernel, dy, weight.T, None, g, A.T, (0,))
        return dx, dA, dB


def fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(A))


def fake_backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
                  ) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_dx, _ = rest
    dA, dB = (torch.empty_like(matrix, dtype=torch.float32) for matrix in (A, B))
    return x.new_empty(x.shape if need_dx else 0), dA, dB


def forward_flops(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *_: Any) -> int:
    """x W^T, drop(x) A^T and h B^T."""
    return 2 * len(x) * (weight.numel() + A.numel() + B.numel())


def backward_flops(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any) -> int:
    """dy B, dy^T h and g^T drop(x), and for dx dy W and g A."""
    *_, need_dx, _ = rest
    dx_numbers = weight.numel() + A.numel() if need_dx else 0
    return 2 * len(x) * (dx_numbers + A.numel() + 2 * B.numel())


lora_forward = register_op("lora_forward", forward, fake_forward, forward_flops)
lora_backward = register_op("lora_backward", backward, fake_backward, backward_flops)
