"""The low-rank update in Triton: tiles, launches and the two operators. Imported only where Triton runs.

Forward:   shrink  h = c drop(x) A^T, with c = s / (1 - dropout)
           gemm    y = x W^T + b + h B^T; the update is added in the accumulator of x W^T
Backward:  expand  g = c dy B and dB = dy^T h, from one read of dy
           outer   dA = g^T drop(x)
           gemm    dx = dy W + keep * (g A); keep is the mask of the dropout
Letters as in lora.py, and J = P r, the columns of h.

The sizes of the tiles are fixed, not tuned at run time, so a shape always gives the same numbers. They compile for
sm_80 and sm_90 within the shared memory and without register spills (tests/test_triton.py; for more shapes:
python tests/aot.py --all).
"""

from typing import Any

import torch
import triton
from torch import Tensor

from minift.ops import register_op
from minift.ops.dropout import drop_threshold
from minift.ops.lora_triton_kernels import expand_kernel, gemm_kernel, outer_kernel, shrink_kernel


def gemm_tiles(dtype: torch.dtype, M: int, N: int, K: int, rank: int, dropout: float) -> dict[str, int]:
    """The sizes of gemm_kernel's tiles, and Triton's launch settings. The limit is the number of registers."""
    # Shapes that are no multiple of 16 are loaded one element at a time, which takes registers for the addresses.
    if dtype == torch.float32 or N % 16 or K % 16:
        return dict(BM=64, BN=64, BK=32, num_warps=8, num_stages=2)
    # With wide tiles x is read less often. A small output would have too few of them for the processors of a GPU, and a
    # large rank or a dropout mask would leave too few registers.
    is_wide = M * N >= 2**22 and rank <= 64 and not dropout
    return dict(BM=128, BN=256 if is_wide else 128, BK=64, num_warps=8, num_stages=3)


def rank_tile(rank: int, dtype: torch.dtype) -> int:
    """The columns of h in a tile: the rank, rounded up to a power of two. At least 16, as a matrix instruction needs,
    and at most 64 (32 in fp32), so that accumulators fit into registers."""
    most = 32 if dtype == torch.float32 else 64
    return min(most, max(16, triton.next_power_of_2(rank)))


def shrink(x: Tensor, A: Tensor, c: float, dropout: float, seed: Tensor | None, h: Tensor) -> None:
    """h (M, J) <- c drop(x) A^T. The columns of h must be contiguous in each row."""
    M, K = x.shape
    J = len(A)
    BM = 64
    BJ = rank_tile(J, x.dtype)
    if x.dtype == torch.float32:
        tiles = dict(BM=BM, BK=32, BJ=BJ, num_warps=8, num_stages=2)
    else:
        tiles = dict(BM=BM, BK=64, BJ=BJ, num_warps=4, num_stages=3)
    grid = (triton.cdiv(M, BM), triton.cdiv(J, BJ))  # one program for each tile of h
    shrink_kernel[grid](
        x, A, h,
        seed,
        M, K, J,
        x.stride(0), x.stride(1),
        A.stride(0), A.stride(1),
        h.stride(0),
        c,
        drop_threshold(dropout),
        DROPOUT=dropout > 0,
        **tiles,
    )


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, offsets: tuple[int, ...],
         dropout: float, seed: Tensor | None) -> Tensor:
    """(M, N): x weight^T + bias, plus keep * (h_p B_p^T) in the columns of every part p."""
    M, K = x.shape
    N = len(weight)
    n, rank = len(B) // len(offsets), B.shape[1]
    y = x.new_empty(M, N)
    tiles = gemm_tiles(x.dtype, M, N, K, rank, dropout)
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
        BR=rank_tile(rank, x.dtype),
        GROUP=8,
        **tiles,
    )
    return y


def outer(x: Tensor, g: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """g^T drop(x), (J, K) in fp32."""
    M, K = x.shape
    J = g.shape[1]
    BJ = rank_tile(J, x.dtype)
    if x.dtype == torch.float32:
        tiles = dict(BM=32, BK=64, BJ=BJ, num_warps=8, num_stages=2)
    else:
        tiles = dict(BM=64, BK=128, BJ=BJ, num_warps=8 if BJ == 64 else 4, num_stages=3)
    # The output is small, so its tiles alone would leave most of the GPU idle. The M tokens are split into chunks of
    # CHUNK, for some 256 programs in all; each writes its own sum, and the sums are added below.
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
    return da.sum(0)


def expand(dy: Tensor, B: Tensor, h: Tensor, offsets: tuple[int, ...], c: float) -> tuple[Tensor, Tensor]:
    """g = c dy_p B_p for every part p, (M, J), and dB = dy_p^T h_p in fp32, like B."""
    M, parts, rank = len(dy), len(offsets), B.shape[1]
    n = len(B) // parts
    # One read of dy has a price: every program writes a dB of its own BM rows, which is read again for the sum. That is
    # 8 r / BM bytes for each two bytes of dy, and above rank 32 more than a second read of dy.
    if rank > 32:
        return expand_in_two(dy, B, h, offsets, c)
    g = torch.empty_like(h)
    if dy.dtype == torch.float32:
        BM, BN = 64, 32
    else:
        BM, BN = 128, 64
    chunks = triton.cdiv(M, BM)
    db = dy.new_empty(chunks, *B.shape, dtype=torch.float32)
    expand_kernel[(chunks, parts)](
        dy,
        B,
        h, g,
        db,
        M, n,
        dy.stride(0), dy.stride(1),
        B.stride(0), B.stride(1),
        c,
        OFFSETS=offsets, R=rank,
        BM=BM, BN=BN, BR=rank_tile(rank, dy.dtype),
        num_warps=8, num_stages=2,
    )
    return g, db.sum(0)


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
        dB.append(outer(dy_part, h_parts[p], 0.0, None).T)  # h_p^T dy_p, transposed
    return g, torch.cat(dB)


# ---- the two operators

# The type of an operator's argument cannot be a tuple of settings, so they take the fields of lora.Update one by one.

def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, offsets: list[int],
            scale: float, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (M, N) and h (M, J), which the backward pass needs."""
    with torch.cuda.device_of(x):
        h = x.new_empty(len(x), len(A))
        shrink(x, A, scale / (1 - dropout), dropout, seed, h)
        y = gemm(x, weight, bias, h, B, tuple(offsets), 0.0, None)  # no dropout: h has it already
        return y, h


def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, offsets: list[int],
             scale: float, dropout: float, seed: Tensor | None, need_dx: bool
             ) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K), or an empty tensor without `need_dx`, and dA and dB in fp32."""
    with torch.cuda.device_of(x):
        g, dB = expand(dy, B, h, tuple(offsets), scale / (1 - dropout))
        dA = outer(x, g, dropout, seed)
        if need_dx:
            # dx = dy W + g A has the form of y = x W^T + h B^T, with a single part
            dx = gemm(dy, weight.T, None, g, A.T, (0,), dropout, seed)
        else:
            dx = x.new_empty(0)
        return dx, dA, dB


def fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(A))


def fake_backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
                  ) -> tuple[Tensor, Tensor, Tensor]:
    need_dx = rest[-1]
    dA, dB = (torch.empty_like(matrix, dtype=torch.float32) for matrix in (A, B))
    return x.new_empty(x.shape if need_dx else 0), dA, dB


def forward_flops(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *_: Any) -> int:
    """x W^T, drop(x) A^T and h B^T."""
    return 2 * len(x) * (weight.numel() + A.numel() + B.numel())


def backward_flops(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any) -> int:
    """dy B, dy^T h and g^T drop(x), and for dx dy W and g A."""
    need_dx = rest[-1]
    dx_numbers = weight.numel() + A.numel() if need_dx else 0
    return 2 * len(x) * (dx_numbers + A.numel() + 2 * B.numel())


lora_forward = register_op("lora_forward", forward, fake_forward, forward_flops)
lora_backward = register_op("lora_backward", backward, fake_backward, backward_flops)
