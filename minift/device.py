"""The machine: its devices, its fast dtype, its memory and its clock."""

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
from minift.openmp import adapt_waiting

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "fp32", "bf16")
MADV_PAGEOUT = 21  # of Linux 5.4; Python's mmap module has no name for it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def configure_process() -> None:
    """Settings of the allocator, of oneDNN and of OpenMP that make training faster and smaller. Call it before the
    first matrix product; the scripts and weights.load do."""
    # setdefault: the user's own environment variables win
    # oneDNN keeps compiled code for each shape of a matrix product, here for 1,024 shapes, and torch for 8. Ragged rows
    # have some 600. With room for 256, pieces of code come and go between the tensors and leave holes: 120 steps of an
    # 18M base on SAMSum took 1,023 MiB instead of 958, at 0.6 times the speed.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "8")
    libc = load_libc()
    if hasattr(libc, "mallopt"):  # of glibc alone: musl's libc has none
        # Keep freed memory in the process: page faults on vocabulary-sized gradients made a full step 1/7 slower.
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)
    adapt_waiting()


@functools.cache
def load_libc() -> ctypes.CDLL | None:
    """The C library of this process, on Linux."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU, then Apple's, then the CPU. Raises UserError for a device that is not here."""
    available = []  # the fastest first
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(f"--device {name}: this machine (or this build of torch) has none; there is "
                        f"{', '.join(available)}")
    if name != "cuda" or WORLD_SIZE == 1:
        return torch.device(name)
    if LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"one GPU per process is needed; this machine has {torch.cuda.device_count()}: lower "
                        "torchrun's --nproc-per-node, or pass --device cpu")
    torch.cuda.set_device(LOCAL_RANK)  # NCCL and Triton use the current device
    return torch.device("cuda", LOCAL_RANK)


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16. Emulated, bf16 would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        # torch has no public names for these; in a torch without them, `bool` answers False
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


@functools.cache
def uses_onednn_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products run in oneDNN's bf16 kernels. oneDNN compiles one kernel for each shape (1 to 8 ms,
    some 1 MB), so callers round the number of tokens to get few shapes."""
    return (device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware multiplies it, else fp32."""
    if name == "auto":
        name = "bf16" if fast_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the peak. macOS and Windows cannot reset the peak of a process: there it is the
    highest since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        give_back_memory()  # or it would count for the next run
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets VmHWM, the peak, to the memory in use now (man 5 proc)
        except OSError:  # /proc is closed: the peak is that of the whole process
            pass


def give_back_memory() -> None:
    """Give the freed memory of the heap back to the system. Batches of many lengths leave holes in it that do not fit
    the next ones: with GPT-2 of 18M parameters in bf16, they took more than the tensors themselves."""
    libc = load_libc()
    if hasattr(libc, "malloc_trim"):  # of glibc alone
        libc.malloc_trim(0)


def process_bytes(live: int, device: torch.device) -> int:
    """An estimate of the memory of the process, in bytes, for a peak of `live` bytes of tensors."""
    if device.type == "cuda":
        return live  # peak_memory counts the tensors alone there
    return round(1.3 * live)  # holes in the heap, measured with GPT-2


def compiled_code_bytes(device: torch.device, dtype: torch.dtype, totals: int) -> int:
    """An estimate of the memory of oneDNN's compiled code, with the holes that it leaves in the heap. `totals` is the
    number of different batch sizes, in tokens: for each, a step has some 25 products of shapes that are new."""
    if not uses_onednn_bf16(device, dtype):
        return 0
    return 17_000_000 * min(totals, 40)  # measured with GPT-2 of 2M and 18M parameters; at 40, oneDNN's cache is full


def release_pages(tensor: torch.Tensor) -> None:
    """Drop the pages of a tensor that is mapped from a file; the system reads them again at the next use (Linux).
    A tensor that is not mapped stays: its pages would go to the swap space."""
    # the storage of a mapped tensor belongs to the file's map, so torch cannot resize it
    if sys.platform == "linux" and not tensor.untyped_storage().resizable():
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # madvise needs the start of a page
        nbytes = tensor.data_ptr() + tensor.nbytes - begin
        load_libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), MADV_PAGEOUT)


def resident_memory(device: torch.device) -> int:
    """Memory in use now, in bytes; 0 if the platform does not report it (Windows)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        return process_status("VmRSS")
    return peak_memory(device) or 0  # macOS reports the peak alone


def process_status(field: str) -> int:
    """A field of this process's status in bytes, such as VmRSS (Linux)."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) * 1024  # the file gives kB
    raise KeyError(field)


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
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, other systems KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def time_call(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call in seconds, until the device has finished."""
    # a GPU works on while Python goes ahead: wait before the start and before the end
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def machine_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()  # on Linux without the model's name
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
