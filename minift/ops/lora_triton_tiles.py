"""The sizes of the tiles of the Triton kernels, and the division of their work over a GPU. Imported only where Triton
runs. Letters as in lora.py.

The sizes are not tuned at run time: on one kind of GPU, a shape always gives the same numbers. They compile for sm_80,
sm_90 and sm_120 within the shared memory and without register spills (tests/test_triton.py; for more shapes:
python tests/aot.py --all).
"""

import functools
from typing import NamedTuple

import torch
import triton


class Gpu(NamedTuple):
    """The facts of a GPU that tiles depend on."""

    processors: int  # streaming multiprocessors; 132 in an H100
    shared_kib: int  # the most shared memory of a block


WITHOUT_GPU = Gpu(132, 227)  # an H100, for Triton's interpreter
# {compute capability: shared_kib}, CUDA C++ Programming Guide, table of technical specifications; elsewhere 99
SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}

# A split loop needs one more launch, to add the parts. By estimate, not measured, that takes as long as some 8 blocks.
LEAST_BLOCKS = 8


def gpu_of(device: torch.device) -> Gpu:
    return cuda_gpu(device) if device.type == "cuda" else WITHOUT_GPU


@functools.cache
def cuda_gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, SHARED_KIB.get((properties.major, properties.minor), 99))


def gemm_tiles(gpu: Gpu, dtype: torch.dtype, M: int, N: int, K: int, rank: int, dropout: float) -> dict[str, int]:
    """The sizes of gemm_kernel's tiles, and Triton's launch settings. The limit is the number of registers."""
    # Shapes that are no multiple of 16 are loaded one element at a time, which takes registers for the addresses.
    if dtype == torch.float32 or N % 16 or K % 16:
        return dict(BM=64, BN=64, BK=32, num_warps=8, num_stages=2)
    wide = dict(BM=128, BN=256, BK=64, num_warps=8, num_stages=3)
    narrow = wide | dict(BN=128)
    # With wide tiles x is read less often. A large rank or a dropout mask would leave too few registers. So would
    # sm_120: its matrix instructions take their factors from registers.
    if rank > 64 or dropout or gpu.shared_kib < 160:
        return narrow
    return min(wide, narrow, key=lambda tiles: gemm_time(gpu, M, N, tiles))  # wide, if they are equal


def persistent_tiles(gpu: Gpu, M: int, N: int, rank: int) -> dict[str, int]:
    """The same for persistent_kernel. The limit is the shared memory, which also holds a tile of y, h and B."""
    wide = dict(BM=128, BN=256, BK=64, num_warps=8, num_stages=3)
    narrow = wide | dict(BN=128)
    if rank > 16:
        return narrow
    return min(wide, narrow, key=lambda tiles: gemm_time(gpu, M, N, tiles))


def gemm_time(gpu: Gpu, M: int, N: int, tiles: dict[str, int]) -> int:
    """The time of a product, in units of its time for an element: the processors compute a wave of tiles at a time, and
    the last wave takes as long as a full one."""
    count = triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"])
    waves = triton.cdiv(count, gpu.processors)
    return waves * tiles["BM"] * tiles["BN"]


def rank_tile(rank: int, dtype: torch.dtype) -> int:
    """The columns of h in a tile: the rank, rounded up to a power of two. At least 16, as a matrix instruction needs,
    and at most 64 (32 in fp32), so that accumulators fit into registers."""
    most = 32 if dtype == torch.float32 else 64
    return min(most, max(16, triton.next_power_of_2(rank)))


def split_length(gpu: Gpu, length: int, block: int, programs: int) -> int:
    """The part of a loop over `length` that each program computes, a multiple of `block`. With too few programs the
    loop is split, so that there are two for each processor of the GPU, but not into less than LEAST_BLOCKS blocks."""
    blocks = triton.cdiv(length, block)
    wanted = triton.cdiv(2 * gpu.processors, max(1, programs))  # max: without tokens there are no programs
    splits = max(1, min(wanted, blocks // LEAST_BLOCKS))
    return triton.cdiv(blocks, splits) * block
