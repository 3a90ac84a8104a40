"""The highest rates of the machine, measured in the same run as the benchmark that is compared with them."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minift.device import time_call


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # Linux; such as "32768K"
    if not path.exists():
        return 2**25
    return int(path.read_text().strip().removesuffix("K")) * 1024


def median_seconds(work: Callable[[], Any], calls: int, warmup: int, device: torch.device) -> float:
    """The median time of a call in seconds, after `warmup` calls that are not counted."""
    for _ in range(warmup):
        time_call(work, device)
    times = [time_call(work, device) for _ in range(calls)]
    return statistics.median(times)


def linear_rate(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the forward pass of one linear layer."""
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    seconds = median_seconds(lambda: F.linear(x, weight), 20, 5, device)
    return 2 * tokens * inputs * outputs / seconds  # 2: a multiplication and an addition


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of three products of large square matrices."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        seconds = median_seconds(lambda a=a, b=b: a @ b, 6, 2, device)
        best = max(best, 2 * size**3 / seconds)
    return best


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy that does not fit into the cache."""
    count = math.ceil(cache_bytes(device) / 2)  # numbers of 4 bytes: twice the size of the cache
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), 6, 2, device)
    return 2 * source.nbytes / seconds
