"""The low-rank update: y = x W^T + b + s (drop(x) A^T) B^T, forward and backward.

Every LoRA layer calls `lora_linear`. A layer may adapt parts of a fused matrix (query and value of GPT-2's
c_attn): the parts' A matrices are stacked, (parts * r, K), as are their B matrices, (parts * n, r), and
`offsets` says at which output each part's n columns begin. The other columns are never touched, and no dense
update is ever built. Letters: M tokens, K inputs, N outputs, r rank, n outputs of one part, s the scale.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                          offsets: tuple[int, ...]) -> Tensor:
    """What `lora_linear` computes, without dropout, in the plainest form: the oracle of its tests."""
    y, parts = F.linear(x, weight, bias), len(offsets)
    for start, a, b in zip(offsets, A.chunk(parts), B.chunk(parts), strict=True):
        update = scale * (x @ a.T) @ b.T
        y = y + F.pad(update, (start, weight.shape[0] - start - b.shape[0]))
    return y


def keep_mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Which elements of x dropout keeps, as bools; the same for the same seed, so that it need not be stored.

    One 64-bit draw serves four elements, compared in 16 bits each: `dropout` is honoured to 1/65,536. On a
    CPU drawing is what dropout costs, and this takes a fifth of F.dropout's time.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    return (draws.view(torch.int16)[: x.numel()] >= min(round(dropout * 65536), 65535) - 32768).view(x.shape)


class LowRankLinear(torch.autograd.Function):
    """The update added in place onto the frozen product, by addmm. Saves x and h = drop(x) A^T, nothing
    else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                offsets: tuple[int, ...], dropout: float, seed: int) -> Tensor:
        a, b, parts = A.to(x.dtype), B.to(x.dtype), len(offsets)
        y = F.linear(x, weight, bias)  # (M, N)
        dropped = x * keep_mask(x, dropout, seed) if dropout else x
        h = dropped @ a.T  # (M, parts * r)
        ctx.s = scale / (1 - dropout)
        for start, h_part, b_part in zip(offsets, h.chunk(parts, 1), b.chunk(parts), strict=True):
            y[:, start : start + len(b_part)].addmm_(h_part, b_part.T, alpha=ctx.s)
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.offsets, ctx.dropout, ctx.seed, ctx.has_bias = offsets, dropout, seed, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h = ctx.saved_tensors
        a, b, parts = A.to(x.dtype), B.to(x.dtype), len(ctx.offsets)
        g, dB = torch.empty_like(h), torch.empty_like(b)
        for start, g_part, h_part, b_part, dB_part in zip(ctx.offsets, g.chunk(parts, 1), h.chunk(parts, 1),
                                                          b.chunk(parts), dB.chunk(parts), strict=True):
            dy_part = dy[:, start : start + len(b_part)]
            g_part.copy_(dy_part @ b_part)
            dB_part.copy_((dy_part.T @ h_part).mul_(ctx.s))
        keep = keep_mask(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        dA = (g.T @ (x if keep is None else x * keep)).mul_(ctx.s)  # (parts * r, K)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if keep is None:
                dx.addmm_(g, a, alpha=ctx.s)
            else:
                dx.add_((g @ a).mul_(keep), alpha=ctx.s)
        if ctx.needs_input_grad[1]:
            dweight = dy.T @ x
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, dA.to(A.dtype), dB.to(B.dtype), None, None, None, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                offsets: tuple[int, ...] = (0,), dropout: float = 0.0) -> Tensor:
    """x (..., K), weight (N, K), bias (N) or None, A (parts * r, K), B (parts * n, r) -> (..., N).

    x, weight and bias share the compute dtype; A and B may be kept in fp32 and get their gradients there.
    `dropout` acts on x in the low-rank branch alone (Hu et al. 2021, section 4.1 with loralib's input
    dropout); its seed comes from torch's default CPU generator, so that it follows `torch.manual_seed` and a
    restored random state.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0
    flat = x.reshape(-1, x.shape[-1])  # (..., K) -> (M, K)
    y = LowRankLinear.apply(flat, weight, bias, A, B, scale, offsets, dropout, seed)
    return y.view(*x.shape[:-1], weight.shape[0])
