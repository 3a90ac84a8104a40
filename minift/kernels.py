"""The low-rank update: y = x W^T + b + s (drop(x) A^T) B^T, forward and backward.

Every LoRA layer calls `lora_linear`. A layer may adapt parts of a fused matrix (query and value of GPT-2's
c_attn): the parts' A matrices are stacked, (parts * r, K), as are their B matrices, (parts * n, r), and
`offsets` says at which output each part's n columns begin. The other columns are never touched, and no dense
update is ever built. Letters: M tokens, K inputs, N outputs, r rank, n outputs of one part, s the scale.

There are two implementations, PyTorch here and Triton in minift/triton_kernels.py. They give the same numbers
up to rounding, dropout included, and keep no more for the backward pass than x, h and a seed.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

KERNELS = ("auto", "triton", "torch")
# Where the Triton kernels were measured to beat PyTorch, forward and backward together: {(GPU, dtype, K, N,
# parts, rank, with dropout): from how many tokens on}, as `python -m minift.bench kernels` prints it. No GPU
# was measured yet, so `auto` is PyTorch everywhere.
TRITON_WINS: dict[tuple[str, str, int, int, int, int, bool], int] = {}


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                          offsets: tuple[int, ...]) -> Tensor:
    """What `lora_linear` computes, without dropout, in the plainest form: the oracle of its tests."""
    y, parts = F.linear(x, weight, bias), len(offsets)
    for start, a, b in zip(offsets, A.chunk(parts), B.chunk(parts), strict=True):
        update = scale * (x @ a.T) @ b.T
        y = y + F.pad(update, (start, weight.shape[0] - start - b.shape[0]))
    return y


FLOPS: dict[Any, Callable[..., int]] = {}  # of our own operators, from their arguments


def operator(name: str, implementation: Callable[..., Any], fake: Callable[..., Any],
             flops: Callable[..., int] = lambda *_: 0) -> Any:
    """`implementation` as torch.ops.minift.NAME, which on fake tensors (the plan's) gives what `fake` gives.
    Not by torch.library.custom_op, whose first call imports torch's compiler: 2 s and 150 MB."""
    torch.library.define(f"minift::{name}", torch.library.infer_schema(implementation, mutates_args=()))
    torch.library.impl(f"minift::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"minift::{name}", fake)
    op = getattr(torch.ops.minift, name)
    FLOPS[op] = flops
    return op


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return (word + 2**63) % 2**64 - 2**63


GOLDEN, MIX_1, MIX_2 = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def threshold(dropout: float) -> int:
    """An element whose 16 bits are below it, as a signed number, is dropped."""
    return min(round(dropout * 65536), 65535) - 32768


def make_keep_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    if x.is_cuda and triton_fault(x.device) is None:
        from . import triton_kernels
        return triton_kernels.keep_mask(x, dropout, seed)
    (M, K), words_a_row = x.shape, (x.shape[1] + 3) // 4
    words = M * words_a_row
    chunk = min(words, 32768) if x.device.type == "cpu" else words  # stays in the cache between lines
    keep = torch.empty(words * 4, dtype=torch.bool, device=x.device)
    steps = torch.arange(chunk, device=x.device).mul_(GOLDEN)
    z, shifted = torch.empty_like(steps), torch.empty_like(steps)

    def xor_shift(bits: int) -> Tensor:  # z ^= z >> bits, where int64's >> would copy the sign
        torch.bitwise_right_shift(z, bits, out=shifted)
        return z.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - bits) - 1))

    for start in range(0, words, max(chunk, 1)):
        torch.add(steps, seed + signed(GOLDEN * start), out=z)
        xor_shift(30).mul_(MIX_1)
        xor_shift(27).mul_(MIX_2)
        part = keep[4 * start : 4 * (start + chunk)]
        torch.ge(xor_shift(31).view(torch.int16)[: len(part)], threshold(dropout), out=part)
    return keep.view(M, words_a_row * 4)[:, :K]


# keep_mask(x, dropout, seed): which elements of x (M, K) dropout keeps, as bools; the same for the same seed,
# a 0-dim int64 tensor on x's device, so that it need not be stored. Four elements of a row share a word of 64
# bits, 16 each, so `dropout` is honoured to 1/65,536. Word i, counted row after row, is SplitMix64's (Steele,
# Lea, Flood 2014), mix(seed + GOLDEN i): it has no state, so every device and every tile of a kernel makes
# the same bits. On a CPU drawing is what dropout costs, and this takes a fifth of F.dropout's time.
keep_mask = operator("keep_mask", make_keep_mask,
                     lambda x, dropout, seed: torch.empty_like(x, dtype=torch.bool))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, offsets: tuple[int, ...],
            scale: float, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (M, N) and h = drop(x) A^T (M, parts * r); drop's 1 / (1 - dropout) goes into the scale."""
    a, b, parts = A.to(x.dtype), B.to(x.dtype), len(offsets)
    y = F.linear(x, weight, bias)
    h = (x * keep_mask(x, dropout, seed) if dropout else x) @ a.T
    for start, h_part, b_part in zip(offsets, h.chunk(parts, 1), b.chunk(parts), strict=True):
        y[:, start : start + len(b_part)].addmm_(h_part, b_part.T, alpha=scale / (1 - dropout))
    return y, h


def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, offsets: tuple[int, ...],
             scale: float, dropout: float, seed: Tensor | None, need_dx: bool
             ) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (M, K) if it is needed, dA and dB."""
    a, b, parts, s = A.to(x.dtype), B.to(x.dtype), len(offsets), scale / (1 - dropout)
    g, dB = torch.empty_like(h), torch.empty_like(b)
    for start, g_part, h_part, b_part, dB_part in zip(offsets, g.chunk(parts, 1), h.chunk(parts, 1),
                                                      b.chunk(parts), dB.chunk(parts), strict=True):
        dy_part = dy[:, start : start + len(b_part)]
        g_part.copy_(dy_part @ b_part)
        dB_part.copy_((dy_part.T @ h_part).mul_(s))
    keep = keep_mask(x, dropout, seed) if dropout else None
    dA = (g.T @ (x if keep is None else x * keep)).mul_(s)  # (parts * r, K)
    dx = None
    if need_dx:
        dx = dy @ weight
        if keep is None:
            dx.addmm_(g, a, alpha=s)
        else:
            dx.add_((g @ a).mul_(keep), alpha=s)
    return dx, dA.to(A.dtype), dB.to(B.dtype)


class LowRankLinear(torch.autograd.Function):
    """The frozen product and its update as one step, by this file's `forward` and `backward` or by those of
    minift/triton_kernels.py. Keeps x, h and the seed, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                offsets: tuple[int, ...], scale: float, dropout: float, seed: Tensor | None,
                triton: bool) -> Tensor:
        ctx.given, ctx.triton, ctx.has_bias = (offsets, scale, dropout, seed), triton, bias is not None
        if triton:
            from . import triton_kernels
        y, h = (triton_kernels.lora_forward if triton else forward)(x, weight, bias, A, B, *ctx.given)
        ctx.save_for_backward(x, weight, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.triton:
            from . import triton_kernels
        x, weight, *rest = ctx.saved_tensors  # once: recomputed activations can be unpacked only once
        dx, dA, dB = (triton_kernels.lora_backward if ctx.triton else backward)(
            dy, x, weight, *rest, *ctx.given, ctx.needs_input_grad[0])
        return (dx if ctx.needs_input_grad[0] else None,
                dy.T @ x if ctx.needs_input_grad[1] else None,
                dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
                dA, dB, None, None, None, None, None)


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # on any device, and slowly
    if device.type != "cuda" or torch.version.cuda is None:
        return f"they need an NVIDIA GPU, and the device is {torch.version.hip and 'ROCm' or device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"they need compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    try:
        from . import triton_kernels
        triton_kernels.try_compiling(device)
    except Exception as error:
        return f"triton cannot compile here: {type(error).__name__}: {error}"
    return None


def choose_kernel(name: str, device: torch.device) -> str:
    """`name` itself. Raises UserError for triton where it cannot run."""
    if name == "triton" and (fault := triton_fault(device)):
        raise UserError(f"--kernel triton: {fault}; leave it out")
    return name


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def triton_wins(x: Tensor, weight: Tensor, A: Tensor, parts: int, dropout: float) -> bool:
    """Whether the Triton kernels can run and were measured to be the faster for these shapes."""
    if not TRITON_WINS or not x.is_cuda or triton_fault(x.device):
        return False
    N, K = weight.shape
    dtype = str(x.dtype).removeprefix("torch.")
    from_tokens = TRITON_WINS.get((device_name(x.device), dtype, K, N, parts, len(A) // parts, dropout > 0))
    return from_tokens is not None and len(x) >= from_tokens


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                offsets: tuple[int, ...] = (0,), dropout: float = 0.0, kernel: str = "auto") -> Tensor:
    """x (..., K), weight (N, K), bias (N) or None, A (parts * r, K), B (parts * n, r) -> (..., N).

    x, weight and bias share the compute dtype; A and B may be kept in fp32 and get their gradients there.
    `dropout` acts on x in the low-rank branch alone (Hu et al. 2021, section 4.1 with loralib's input
    dropout); its seed comes from torch's default generator of x's device, so that it follows
    `torch.manual_seed`, a restored random state, and the replay of a CUDA graph. `kernel` is one of KERNELS:
    auto takes Triton where TRITON_WINS says so; triton must be able to run (`choose_kernel`), and computes in
    fp32, bf16 or fp16.
    """
    flat = x.reshape(-1, x.shape[-1])  # (..., K) -> (M, K)
    triton = kernel == "triton" or kernel == "auto" and triton_wins(flat, weight, A, len(offsets), dropout)
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout else None
    y = LowRankLinear.apply(flat, weight, bias, A, B, offsets, scale, dropout, seed, triton)
    return y.view(*x.shape[:-1], weight.shape[0])
