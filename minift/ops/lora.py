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
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.errors import UserError
from minift.ops.linear import product
from minift.ops.register import operator

KERNELS = ("auto", "triton", "torch")
# Where the Triton kernels were measured to beat PyTorch, forward and backward together: {(GPU, dtype, K, N,
# parts, n, rank, with dropout): from how many tokens on}, as `python -m minift.bench kernels` prints it. No
# GPU was measured yet, so `auto` is PyTorch everywhere.
TRITON_WINS: dict[tuple[str, str, int, int, int, int, int, bool], int] = {}


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                          offsets: tuple[int, ...]) -> Tensor:
    """What `lora_linear` computes, without dropout, in the plainest form: the oracle of its tests."""
    y, parts = F.linear(x, weight, bias), len(offsets)
    for start, a, b in zip(offsets, A.chunk(parts), B.chunk(parts), strict=True):
        update = scale * (x @ a.T) @ b.T
        y = y + F.pad(update, (start, weight.shape[0] - start - b.shape[0]))
    return y


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return (word + 2**63) % 2**64 - 2**63


GOLDEN, MIX_1, MIX_2 = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def threshold(dropout: float) -> int:
    """An element whose 16 bits are at most this, as a signed number, is dropped."""
    return min(max(round(dropout * 65536), 1), 65535) - 32769


def splitmix64(count: int, seed: Tensor) -> Tensor:
    """The first outputs of SplitMix64 (Steele, Lea, Flood 2014): mix(seed + GOLDEN i)."""
    z = torch.arange(count, device=seed.device).mul_(GOLDEN).add_(seed)
    for bits, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        z = (z ^ z >> bits & 2 ** (64 - bits) - 1) * factor  # int64's >> alone would copy the sign
    return z


def random_bits(x: Tensor, seed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """16 random bits for each element of x (M, K), as int16: some rows at a time, together with which. On a
    CPU they stay in the threads' caches until they are used: each makes half a megabyte."""
    (M, K), words = x.shape, (x.shape[1] + 3) // 4
    pieces = math.ceil(M * words / (65536 * torch.get_num_threads())) if x.device.type == "cpu" else 1
    rows = math.ceil(M / max(pieces, 1))
    of_columns, of_rows = splitmix64(words + M, seed).split([words, M])
    z = torch.empty(rows, words, dtype=torch.int64, device=x.device)
    high = torch.empty_like(z)
    for first in range(0, M, max(rows, 1)):
        if first + rows > M:
            z, high = z[: M - first], high[: M - first]
        torch.mul(of_rows[first : first + rows, None], of_columns, out=z)
        z.bitwise_xor_(torch.bitwise_right_shift(z, 32, out=high)).mul_(MIX_1)
        yield slice(first, first + rows), z.view(torch.int16)[:, :K]


def make_keep_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    if x.is_cuda and triton_fault(x.device) is None:
        from minift.ops import lora_triton as triton_kernels
        return triton_kernels.keep_mask(x, dropout, seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for rows, values in random_bits(x, seed):
        torch.gt(values, threshold(dropout), out=keep[rows])
    return keep


# keep_mask(x, dropout, seed): which elements of x (M, K) dropout keeps, as bools; the same for the same seed,
# a 0-dim int64 tensor on x's device, so that it need not be stored. Four elements of a row share a word of 64
# bits, 16 each, so `dropout` is honoured to 1/65,536. A word is the product p of its row's number and its
# column's, both SplitMix64's, then (p ^ p >> 32) MIX_1: the first brings p's good high bits down, and without
# the second the low bits would be related where two rows' numbers end alike. There is no state, so every
# device and every tile of a kernel makes the same bits. SplitMix64 itself, three times as many operations a
# word, took 1.7 times as long, and no test of tests/test_kernels.py tells its masks from these.
keep_mask = operator("keep_mask", make_keep_mask,
                     lambda x, dropout, seed: torch.empty_like(x, dtype=torch.bool))


def make_dropped(tensors: list[Tensor], dropout: float, seed: Tensor) -> list[Tensor]:
    if tensors[0].device.type != "cpu":
        keep = make_keep_mask(tensors[0], dropout, seed)
        return [x * keep for x in tensors]
    outs = [torch.empty_like(x) for x in tensors]
    compared = torch.int16 if tensors[0].itemsize == 2 else tensors[0].dtype  # bf16 would round the bits
    for rows, values in random_bits(tensors[0], seed):
        values = values.to(compared)
        for x, out in zip(tensors, outs, strict=True):
            torch.ops.aten.threshold_backward.grad_input(
                x.view(compared)[rows], values, threshold(dropout), grad_input=out.view(compared)[rows])
    return outs


# dropped(tensors, dropout, seed): tensors of one shape (M, K) with zeros where keep_mask says no, not scaled.
# On a CPU the mask never exists: threshold_backward compares and selects in one pass, which takes a twentieth
# of the time of a comparison and a product with bools (bf16).
dropped = operator("dropped", make_dropped,
                   lambda tensors, dropout, seed: [torch.empty_like(x) for x in tensors])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, offsets: tuple[int, ...],
            scale: float, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (M, N) and h = drop(x) A^T (M, parts * r); drop's 1 / (1 - dropout) goes into the scale.

    Here and in `backward` h, g and dB lie column after column: as thin as they are, on a CPU that makes their
    products up to seven times as fast, that for dB in fp32 the most.
    """
    a, bT, parts = A.to(x.dtype), B.to(x.dtype).T, len(offsets)
    y = product(x, weight.T, bias)
    h = (a @ (dropped([x], dropout, seed)[0] if dropout else x).T).T
    for start, h_part, bT_part in zip(offsets, h.chunk(parts, 1), bT.chunk(parts, 1), strict=True):
        y[:, start : start + bT_part.shape[1]].addmm_(h_part, bT_part, alpha=scale / (1 - dropout))
    return y, h


def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, offsets: tuple[int, ...],
             scale: float, dropout: float, seed: Tensor | None, need_dx: bool
             ) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (M, K) if it is needed, dA and dB."""
    a, bT, parts, s = A.to(x.dtype), B.to(x.dtype).T, len(offsets), scale / (1 - dropout)
    g, dBT = torch.empty_like(h), bT.new_empty(bT.shape)
    for start, g_part, h_part, bT_part, dBT_part in zip(offsets, g.chunk(parts, 1), h.chunk(parts, 1),
                                                        bT.chunk(parts, 1), dBT.chunk(parts, 1), strict=True):
        dy_part = dy[:, start : start + bT_part.shape[1]]
        torch.mm(bT_part, dy_part.T, out=g_part.T)
        torch.mm(h_part.T, dy_part, out=dBT_part)
    if dropout:
        x, *update = dropped([x, g @ a] if need_dx else [x], dropout, seed)
    dA = g.T @ x  # (parts * r, K)
    dx = None
    if need_dx:
        dx = product(dy, weight)
        dx = dx.add_(update[0], alpha=s) if dropout else dx.addmm_(g, a, alpha=s)
    return dx, dA.mul_(s).to(A.dtype), dBT.mul_(s).T.to(B.dtype)


class LowRankLinear(torch.autograd.Function):
    """The frozen product and its update as one step, by this file's `forward` and `backward` or by those of
    minift/triton_kernels.py. Keeps x, h and the seed, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                offsets: tuple[int, ...], scale: float, dropout: float, seed: Tensor | None,
                triton: bool) -> Tensor:
        ctx.given, ctx.triton, ctx.has_bias = (offsets, scale, dropout, seed), triton, bias is not None
        if triton:
            from minift.ops import lora_triton as triton_kernels
        y, h = (triton_kernels.lora_forward if triton else forward)(x, weight, bias, A, B, *ctx.given)
        ctx.save_for_backward(x, weight, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.triton:
            from minift.ops import lora_triton as triton_kernels
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
        from minift.ops import lora_triton as triton_kernels
        triton_kernels.try_compiling(device)
    except Exception as error:
        return f"triton cannot compile here: {type(error).__name__}: {error}"
    return None


def check_kernel(name: str, device: torch.device) -> None:
    """Raises UserError for triton where it cannot run."""
    if name == "triton" and (fault := triton_fault(device)):
        raise UserError(f"--kernel triton: {fault}; leave it out")


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def triton_wins(x: Tensor, weight: Tensor, B: Tensor, parts: int, dropout: float) -> bool:
    """Whether the Triton kernels can run and were measured to be the faster for these shapes."""
    if not TRITON_WINS or not x.is_cuda or triton_fault(x.device):
        return False
    N, K = weight.shape
    dtype, n, rank = str(x.dtype).removeprefix("torch."), len(B) // parts, B.shape[1]
    from_tokens = TRITON_WINS.get((device_name(x.device), dtype, K, N, parts, n, rank, dropout > 0))
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
    triton = kernel == "triton" or kernel == "auto" and triton_wins(flat, weight, B, len(offsets), dropout)
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout else None
    y = LowRankLinear.apply(flat, weight, bias, A, B, offsets, scale, dropout, seed, triton)
    return y.view(*x.shape[:-1], weight.shape[0])
