"""The addition to the residual stream and the layer normalisation after it (Ba et al. 2016), as one step.

The fast version has a kernel for each pass, in norm_triton.py. It is used where a Triton kernel was chosen with
--kernel and the norm is frozen: a trained norm also needs the gradients of its weight and bias. Its backward pass adds
the gradient that comes along the residual stream, so that no launch is needed for it.

Letters in shape comments: N tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift import ops

MOST_CHANNELS = 8192  # of the kernels: a row must fit into the registers of a program


def add_norm_reference(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
                       ) -> tuple[Tensor, Tensor]:
    """x (N, C), branch (N, C) or None, weight (C,), bias (C,) -> x + branch, and its normalisation, both (N, C)."""
    if branch is not None:
        x = x + branch
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, kernel: str = "auto"
             ) -> tuple[Tensor, Tensor]:
    """As add_norm_reference; all tensors have one dtype. kernel: one of KERNELS. Those that use Triton must be able to
    run (`check_kernel`); auto does not use it here."""
    uses_triton = kernel not in ("auto", "torch") and not ops.plain
    is_frozen = not (weight.requires_grad or bias.requires_grad)
    if uses_triton and is_frozen and branch is not None and len(weight) <= MOST_CHANNELS:
        return AddNorm.apply(x, branch, weight, bias, eps)
    return add_norm_reference(x, branch, weight, bias, eps)


class AddNorm(torch.autograd.Function):
    """Keeps the sum alone: the backward pass reads it anyway, and computes its mean and variance again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from minift.ops import norm_triton
        total, normed = norm_triton.add_norm(x, branch, weight, bias, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # nothing reads the sum of the last norm: its gradient is None, not zeros
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dx = dtotal
        if dnormed is not None:
            from minift.ops import norm_triton
            dx = norm_triton.add_norm_backward(dtotal, dnormed, total, weight, ctx.eps)
        return dx, dx, None, None, None
