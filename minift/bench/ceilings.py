"""What the machine can do at most, measured in the same run as the benchmark."""

import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from minift.device import time_call


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) * 1024 if path.exists() else 2**25


def linear_rate(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one frozen linear layer, the median of 20 calls after 5 warm-up calls."""
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    times = [time_call(lambda: F.linear(x, weight), device) for _ in range(25)][5:]
    return 2 * tokens * inputs * outputs / statistics.median(times)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of three large square products."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        times = [time_call(lambda a=a, b=b: a @ b, device) for _ in range(8)][2:]
        best = max(best, 2 * size**3 / statistics.median(times))
    return best


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy that does not fit into the cache."""
    count = math.ceil(cache_bytes(device) / 2)  # fp32 numbers: twice the cache
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    times = [time_call(lambda: target.copy_(source), device) for _ in range(8)][2:]
    return 2 * source.nbytes / statistics.median(times)
