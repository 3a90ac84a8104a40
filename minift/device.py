"""What this machine can do: its devices, the dtype it computes fast in, and the time and memory that work
takes."""

import ctypes
import functools
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

# On a CPU, oneDNN and torch keep compiled code for each shape of a product, some 1 MB a shape and up to 1,024
# shapes, most of which never come again in ragged rows. 256 are those of 20 batches of SAMSum; with 64 a step
# takes a tenth longer. To be set before the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "8")
if sys.platform == "linux":
    # The heap keeps what is freed, large blocks too: to fault the pages of GPT-2's vocabulary-sized gradients
    # in again made a full step a seventh slower.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's, which musl does without
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)

import torch  # noqa: E402

from minift import distributed as parallel
from minift.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "fp32", "bf16")
MADV_PAGEOUT = 21  # Linux 5.4's, which Python's mmap does not name


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU, then Apple's, then the CPU. Raises UserError for a device that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in here.items() if found)
    if not here[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has none; there is "
                        f"{', '.join(device for device, found in here.items() if found)}")
    if name != "cuda" or parallel.WORLD == 1:
        return torch.device(name)
    if parallel.LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"a GPU for each process, and this machine has {torch.cuda.device_count()}: lower "
                        "torchrun's --nproc-per-node, or pass --device cpu")
    torch.cuda.set_device(parallel.LOCAL_RANK)  # what `cuda` means from now on, to NCCL and Triton too
    return torch.device("cuda", parallel.LOCAL_RANK)


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
    """Whether matrix products go to oneDNN, in bf16. It compiles one kernel for each shape, in 1 to 8 ms, and
    keeps it in some 1 MB, so numbers of tokens are rounded to a few values."""
    return (device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware has it, else fp32. bf16 by name is honoured wherever torch can do
    it."""
    if name == "auto":
        name = "bf16" if fast_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement. On Linux the freed heap goes back to the system first, so that one run's peak
    does not hide the next one's; other systems cannot reset a process's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            libc.malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except (OSError, AttributeError):  # no glibc, or /proc is closed: the peak is the whole process's
            pass


def taken(live: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that a peak of live tensors takes. On a CPU the heap has holes between them, three tenths more as
    measured with GPT-2, and oneDNN's compiled code takes some 190 MB once its cache is full."""
    if device.type == "cuda":
        return live
    return round(1.3 * live) + (190_000_000 if uses_onednn_bf16(device, dtype) else 0)


def page_out(tensor: torch.Tensor) -> None:
    """Let a tensor that is mapped from a file leave memory until it is read again, on Linux. Memory of
    torch's own stays: it would be written to the swap space."""
    if sys.platform == "linux" and not tensor.untyped_storage().resizable():
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        nbytes = tensor.data_ptr() + tensor.nbytes - begin
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), MADV_PAGEOUT)


def resident_memory(device: torch.device) -> int:
    """Bytes in use now, which a run's own come on top of: 0 where nobody tells (Windows)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        return process_status("VmRSS")
    return peak_memory(device) or 0  # macOS tells the peak alone


def process_status(field: str) -> int:
    """Bytes that Linux gives for a field of this process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the highest point since the reset: allocated on a GPU, resident in the process on a CPU. None
    on Windows, where Python's standard library does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        return process_status("VmHWM")
    if sys.platform == "win32":
        return None
    import resource  # exists on Unix alone
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, to the end of what it started on the device."""
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
