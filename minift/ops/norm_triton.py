"""Addition and layer normalisation in Triton, for norm.py. Imported only where Triton runs.

A program computes a tile (ROWS, BLOCK) of whole rows, with sums in fp32. Not run on a GPU yet: the tests run it in
Triton's interpreter, and compile it. Letters as in norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift.ops import register_op


@triton.jit
def load(pointers, mask):
    """A tile in fp32, with 0 where the mask is False."""
    return tl.load(pointers, mask, other=0.0).to(tl.float32)


@triton.jit
def standardise(tile, mask, C, eps):
    """(tile - mean) / std of each row, with 0 where the mask is False; and 1 / std."""
    mean = tl.sum(tile, 1) / C
    centered = tl.where(mask, tile - mean[:, None], 0.0)  # E x^2 - (E x)^2 would be inexact where the mean is large
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / C + eps)
    return centered * rstd[:, None], rstd


@triton.jit
def add_norm_kernel(
    x, branch,  # (N, C)
    weight, bias,  # (C,)
    total, normed,  # (N, C)
    N, C,
    eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """total = x + branch, normed = standardised(total) weight + bias."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = rows[:, None] * C + c[None, :]
    mask = (rows < N)[:, None] & (c < C)[None, :]
    added = (load(x + at, mask) + load(branch + at, mask)).to(total.dtype.element_ty)
    tl.store(total + at, added, mask)
    z, _ = standardise(added.to(tl.float32), mask, C, eps)  # of the rounded sum, which the backward pass reads
    result = z * load(weight + c, c < C)[None, :] + load(bias + c, c < C)[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask)


@triton.jit
def add_norm_backward_kernel(
    dtotal,  # (N, C), or None for 0
    dnormed, total,  # (N, C)
    weight,  # (C,)
    dx,  # (N, C)
    N, C,
    eps,
    HAS_DTOTAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx = dtotal + (d - mean(d) - z mean(d z)) / std, with d = dnormed weight and z = standardised(total)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = rows[:, None] * C + c[None, :]
    mask = (rows < N)[:, None] & (c < C)[None, :]
    z, rstd = standardise(load(total + at, mask), mask, C, eps)
    d = load(dnormed + at, mask) * load(weight + c, c < C)[None, :]
    mean_d = tl.sum(d, 1) / C
    mean_dz = tl.sum(d * z, 1) / C
    tile = (d - mean_d[:, None] - z * mean_dz[:, None]) * rstd[:, None]
    if HAS_DTOTAL:
        tile += load(dtotal + at, mask)
    tl.store(dx + at, tile.to(dx.dtype.element_ty), mask)


def tiles(C: int) -> dict[str, int]:
    """A tile has whole rows, and 1,024 numbers if they are short. A thread has at most 16 numbers."""
    BLOCK = triton.next_power_of_2(C)
    return dict(ROWS=max(1, 1024 // BLOCK), BLOCK=BLOCK, num_warps=min(16, max(4, BLOCK // 256)))


def forward(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch and its normalisation, (N, C)."""
    x, branch = x.contiguous(), branch.contiguous()
    N, C = x.shape
    settings = tiles(C)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, not on that of the tensors
        add_norm_kernel[(triton.cdiv(N, settings["ROWS"]),)](
            x, branch,
            weight, bias,
            total, normed,
            N, C,
            eps,
            **settings,
        )
    return total, normed


def backward(dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx (N, C): the gradient of x, and also that of branch. dtotal: None for 0."""
    dtotal = None if dtotal is None else dtotal.contiguous()
    N, C = total.shape
    settings = tiles(C)
    dx = torch.empty_like(total)
    with torch.cuda.device_of(total):
        add_norm_backward_kernel[(triton.cdiv(N, settings["ROWS"]),)](
            dtotal,
            dnormed.contiguous(), total,
            weight,
            dx,
            N, C,
            eps,
            HAS_DTOTAL=dtotal is not None,
            **settings,
        )
    return dx


def fake_forward(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def fake_backward(dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(total)


add_norm = register_op("add_norm", forward, fake_forward)
add_norm_backward = register_op("add_norm_backward", backward, fake_backward)
