"""y = x W^T + b, forward and backward, as fast as a CPU makes it.

Letters in shape comments: M tokens, K inputs, N outputs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.device import uses_onednn_bf16

FEW = 32  # tokens


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times matrix (K, N), plus bias (N).

    oneDNN leaves products in bf16 of 0.75 N to 2 N tokens with fewer than some 1,280 outputs to one thread.
    In pieces it shares them: 1.8 times as fast with 768 outputs on two cores with AMX. And it packs the right
    matrix anew in each product: few tokens had better stand there, as in decoding, 1.5 times as fast.
    """
    (M, _), N, onednn = x.shape, matrix.shape[1], uses_onednn_bf16(x.device, x.dtype)
    turned = matrix.T.is_contiguous()  # as a weight is, unless it is mapped from one of GPT-2's files
    if onednn and turned and M <= FEW:
        y = (matrix.T @ x.T).T
        return y.contiguous() if bias is None else torch.add(y, bias, out=x.new_empty(M, N))
    if not onednn or N >= 1280 or not 0.75 * N <= M < 2 * N:
        if bias is None:
            return x @ matrix
        if onednn and turned:  # addmm would fill y with the bias first
            return torch.ops.mkldnn._linear_pointwise(x, matrix.T, bias, "none", [], "")
        return torch.addmm(bias, x, matrix)
    y = x.new_empty(M, N)
    rows, columns = (M, math.ceil(N / 2)) if M >= 1.5 * N else (max(1, 2 * N // 3), N)
    for some, out in zip(x.split(rows), y.split(rows), strict=True):
        for i in range(0, N, columns):
            part = slice(i, i + columns)
            if bias is None:
                torch.mm(some, matrix[:, part], out=out[:, part])
            else:
                torch.addmm(bias[part], some, matrix[:, part], out=out[:, part])
    return y


class PiecewiseLinear(torch.autograd.Function):
    """F.linear by `product`. Keeps x only where the matrix trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (product(dy, weight) if ctx.needs_input_grad[0] else None,
                dy.T @ x if ctx.needs_input_grad[1] else None,
                dy.sum(0) if ctx.needs_input_grad[2] else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), weight (N, K), bias (N) or None, all of one dtype -> (..., N)."""
    if not uses_onednn_bf16(x.device, x.dtype):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y = PiecewiseLinear.apply(flat, weight, bias)
    else:  # a Function costs a decoding step a twentieth
        y = product(flat, weight.T, bias)
    return y.view(*x.shape[:-1], len(weight))  # -1 would be ambiguous where there is no token
