"""The large product with the low-rank update, as a persistent kernel with tensor descriptors (TMA), for Hopper and
later. Imported only where Triton runs. Letters, names and rules as in lora_triton_kernels.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift.ops.lora_triton_gemm import add_update
from minift.ops.lora_triton_kernels import INTERPRETED
from minift.ops.lora_triton_tiles import gpu_of, persistent_tiles, rank_tile


@triton.jit
def load_block(descriptor, row, column):
    """A tile, with 0 outside of the matrix."""
    tile = descriptor.load([row, column])
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def persistent_kernel(
    x, w, bias,  # (M, K), (N, K) or transposed (K, N), (N,)
    h, b,  # (M, P R), (P n, R)
    y,  # (M, N)
    M, N, K, n,
    stride_xm,
    stride_w,  # between the rows of w as it is stored
    stride_bn: tl.constexpr, stride_br: tl.constexpr,
    OFFSETS: tl.constexpr, R: tl.constexpr,
    BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x w^T + bias + h b^T. One program for each processor computes tile (BM, BN) after tile of y, in the order of
    gemm_kernel. `flatten` makes one loop of the two: loads of the next tile begin before this one is stored."""
    x_blocks = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BM, BK])
    if TRANSPOSED:
        w_blocks = tl.make_tensor_descriptor(w, [K, N], [stride_w, 1], [BK, BN])
    else:
        w_blocks = tl.make_tensor_descriptor(w, [N, K], [stride_w, 1], [BN, BK])
    y_blocks = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BM, BN])
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        band = tile // (GROUP * tiles_n)
        height = min(tiles_m - band * GROUP, GROUP)
        in_band = tile % (GROUP * tiles_n)
        first_row = (band * GROUP + in_band % height) * BM
        first = in_band // height * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            x_tile = load_block(x_blocks, first_row, k0)  # (BM, BK)
            if TRANSPOSED:
                w_tile = load_block(w_blocks, k0, first)  # (BK, BN)
            else:
                w_tile = load_block(w_blocks, first, k0).T
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        rows = first_row.to(tl.int64) + tl.arange(0, BM)
        columns = first + tl.arange(0, BN)
        acc = add_update(acc, h, b, rows, columns, first, M, n, stride_bn, stride_br, OFFSETS, R, BN, BR)
        if BIAS:
            acc += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
        y_blocks.store([first_row, first], acc.to(y.dtype.element_ty))


def is_possible(x: Tensor, weight: Tensor) -> bool:
    """Whether descriptors can describe x (M, K), weight (N, K) and y: 16-bit numbers, and rows that begin at multiples
    of 16 bytes. The weight may be the transposed view of a matrix."""
    stored = weight if weight.stride(1) == 1 else weight.T
    rows_are_aligned = all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, stored))
    return x.itemsize == 2 and rows_are_aligned and len(weight) % 8 == 0 and len(x) > 0


def persistent_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, offsets: tuple[int, ...]
                    ) -> Tensor:
    """(M, N): x weight^T + bias, plus h_p B_p^T in the columns of every part p. Only where `is_possible`."""
    M, K = x.shape
    N = len(weight)
    n, rank = len(B) // len(offsets), B.shape[1]
    y = x.new_empty(M, N)
    transposed = weight.stride(1) != 1
    gpu = gpu_of(x.device)
    tiles = persistent_tiles(gpu, M, N, rank)
    count = triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"])
    triton.set_allocator(allocate)  # in each call: the setting belongs to a thread, and backward passes have their own
    persistent_kernel[(min(count, gpu.processors),)](
        x, weight, bias,
        h, B,
        y,
        M, N, K, n,
        x.stride(0),
        weight.stride(1 if transposed else 0),
        B.stride(0), B.stride(1),
        OFFSETS=offsets, R=rank,
        BIAS=bias is not None, TRANSPOSED=transposed,
        BR=rank_tile(rank, x.dtype),
        GROUP=8,
        **tiles,
    )
    return y


def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors, which the kernel writes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
