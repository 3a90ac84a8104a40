"""The machine: its devices, the dtype that it multiplies fast, its memory and its clock."""

import ctypes
import functools
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from minift.distributed import LOCAL_RANK, WORLD_SIZE
from minift.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "fp32", "bf16")
MADV_PAGEOUT = 21  # of Linux 5.4; Python's mmap module has no name for it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def configure_process() -> None:
    """Settings of the allocator and of oneDNN that training needs to be fast and small. Call it before the first
    matrix product; the scripts and weights.load do."""
    # oneDNN and torch keep compiled code for each shape of a matrix product, some 1 MB a shape, by default for
    # 1,024 shapes. 256 are the shapes of 20 ragged batches of SAMSum; with 64 a step takes a tenth longer.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "8")
    libc = load_libc()
    if hasattr(libc, "mallopt"):
        # Keep freed memory in the process: page faults on vocabulary-sized gradients made a full step 1/7 slower.
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


@functools.cache
def load_libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU, then Apple's, then the CPU. Raises UserError for a device that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in here.items() if found)
    if not here[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has none; there is "
                        f"{', '.join(device for device, found in here.items() if found)}")
    if name != "cuda" or WORLD_SIZE == 1:
        return torch.device(name)
    if LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"one GPU per process is needed; this machine has {torch.cuda.device_count()}: lower "
                        "torchrun's --nproc-per-node, or pass --device cpu")
    torch.cuda.set_device(LOCAL_RANK)  # what `cuda` means from now on, to NCCL and Triton too
    return torch.device("cuda", LOCAL_RANK)


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16; emulated, it would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public name for these
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


@functools.cache
def uses_onednn_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products run in oneDNN's bf16 kernels. It compiles one for each shape, in 1 to 8 ms and some
    1 MB, so numbers of tokens are rounded."""
    return (device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware multiplies it, else fp32."""
    if name == "auto":
        name = "bf16" if fast_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement. On Linux freed memory goes back to the system first, so that one run's peak does not
    hide the next one's; other systems cannot reset the peak of a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            load_libc().malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except (OSError, AttributeError):  # no glibc, or /proc is closed: the peak is that of the whole process
            pass


def process_bytes(live: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of the process for a peak of `live` bytes of tensors. On a CPU the heap has holes, measured as three
    tenths more with GPT-2, and oneDNN's compiled code takes some 190 MB once its cache is full."""
    if device.type == "cuda":
        return live
    return round(1.3 * live) + (190_000_000 if uses_onednn_bf16(device, dtype) else 0)


def release_pages(tensor: torch.Tensor) -> None:
    """Let the pages of a tensor that is mapped from a file leave memory until they are read again (Linux). A tensor
    that is not mapped stays: its pages would go to the swap space."""
    if sys.platform == "linux" and not tensor.untyped_storage().resizable():
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        nbytes = tensor.data_ptr() + tensor.nbytes - begin
        load_libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), MADV_PAGEOUT)


def resident_memory(device: torch.device) -> int:
    """Memory in use now, in bytes; 0 if the platform does not report it (Windows)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        return process_status("VmRSS")
    return peak_memory(device) or 0  # macOS reports only the peak


def process_status(field: str) -> int:
    """Bytes that Linux gives for a field of this process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_memory(device: torch.device) -> int | None:
    """The highest memory since the reset, in bytes: allocated on a GPU, resident in the process on a CPU. None on
    Windows, where Python's standard library does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        return process_status("VmHWM")
    if sys.platform == "win32":
        return None
    import resource  # exists on Unix alone
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_call(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call in seconds, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
