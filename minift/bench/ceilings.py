"""The highest rates of the machine, measured in the same run as the benchmark that is compared with them."""

import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from minift.bench.timing import time_in_turn

COPY_BYTES = 2**30  # of the copy on a GPU: 100 MB would lie in its L2 cache for the most part
MATRIX_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048, 3072)}
SAMPLES = 7


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # Linux; such as "32768K"
    if not path.exists():
        return 2**25
    return int(path.read_text().strip().removesuffix("K")) * 1024


def linear_rate(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the forward pass of one linear layer."""
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    times = time_in_turn({"linear": lambda: F.linear(x, weight)}, 3 * SAMPLES, device)
    return 2 * tokens * inputs * outputs / statistics.median(times["linear"])  # 2: a multiplication and an addition


def matmul_rate(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...] | None = None) -> float:
    """FLOP/s of the fastest of several products of large square matrices."""
    best = 0.0
    for size in sizes or MATRIX_SIZES["cuda" if device.type == "cuda" else "cpu"]:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        times = time_in_turn({size: lambda a=a, b=b: a @ b}, SAMPLES, device)
        best = max(best, 2 * size**3 / statistics.median(times[size]))
    return best


def copy_rate(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes/s, read and written, of a copy that does not fit into the cache."""
    nbytes = nbytes or 2 * cache_bytes(device)
    if device.type == "cuda":
        nbytes = max(nbytes, COPY_BYTES)
    source = torch.randn(math.ceil(nbytes / 4), device=device)  # numbers of 4 bytes
    target = torch.empty_like(source)
    times = time_in_turn({"copy": lambda: target.copy_(source)}, SAMPLES, device)
    return 2 * source.nbytes / statistics.median(times["copy"])
