"""Which implementation computes the low-rank update, PyTorch or Triton: `--kernel`."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from minift.device import dtype_name
from minift.errors import UserError

KERNELS = ("auto", "triton", "torch")
# The layers for which the Triton kernels were measured to be faster than PyTorch, forward and backward together, as
# {(GPU, dtype, K, N, parts, n, rank, with dropout): least number of tokens}, with the letters of lora.py.
# `python -m minift.bench kernels` measures both. No GPU was measured yet, so `auto` is PyTorch everywhere.
TRITON_WINS: dict[tuple[str, str, int, int, int, int, int, bool], int] = {}


def check_kernel(name: str, device: torch.device) -> None:
    """Raises UserError if `--kernel name` cannot run on the device."""
    if name != "triton":
        return
    if reason := why_no_triton(device):
        raise UserError(f"--kernel triton: {reason}; leave it out")


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on the device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter runs on any device, slowly: for tests
    if device.type != "cuda" or torch.version.cuda is None:
        found = "ROCm" if torch.version.hip else device.type
        return f"the kernels need an NVIDIA GPU, and the device is {found}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability 8.0, and {name} is older"
    try:  # Triton also needs a C compiler and the driver's headers
        from minift.ops import dropout_triton
        dropout_triton.try_compiling(device)
    except Exception as error:
        return f"triton cannot compile here: {type(error).__name__}: {error}"
    return None


@functools.cache
def device_name(device: torch.device) -> str:
    """The name of a GPU. Every LoRA layer asks for it in every pass, so it is cached."""
    return torch.cuda.get_device_name(device)


def triton_wins(x: Tensor, weight: Tensor, B: Tensor, parts: int, dropout: float) -> bool:
    """Whether the Triton kernels can run and were measured to be faster for these shapes: x (M, K), weight
    (N, K), B (parts * n, r)."""
    if not TRITON_WINS or not x.is_cuda or why_no_triton(x.device):
        return False
    gpu, dtype = device_name(x.device), dtype_name(x.dtype)
    N, K = weight.shape
    n, rank = len(B) // parts, B.shape[1]
    least_tokens = TRITON_WINS.get((gpu, dtype, K, N, parts, n, rank, dropout > 0))
    return least_tokens is not None and len(x) >= least_tokens
