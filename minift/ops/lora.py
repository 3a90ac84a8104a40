"""The linear layer of LoRA (Hu et al. 2021, section 4.1): y = x W^T + b + s (drop(x) A^T) B^T.

Every LoRA layer calls `lora_linear`. A layer may adapt parts of a fused matrix, such as query and value of GPT-2's
c_attn. Then the A matrices of the parts are stacked, and so are the B matrices, and `offsets` gives the first output of
each part. The other outputs do not change, and the dense update s B A (N, K) is never computed.

Letters in shape comments: M tokens, K inputs, N outputs, P parts, n outputs of a part, r rank, s the scale;
A is (P r, K) and B is (P n, r).

The fast version has two implementations, PyTorch in this file and Triton in lora_triton.py. They agree up to rounding,
also with dropout. Both keep x, h = drop(x) A^T and the seed of the dropout for the backward pass.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift import ops
from minift.ops.cast import cast
from minift.ops.dropout import drop, dropout_reference
from minift.ops.kernel_choice import choose
from minift.ops.linear import linear_reference, matmul, matmul_to, unflatten_like


class Update(NamedTuple):
    """The settings of a low-rank update."""

    offsets: tuple[int, ...]  # the first output of each part
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None  # of the dropout

    @property
    def total_scale(self) -> float:
        """The scale of the update divided by 1 - dropout: so drop(x), which is larger, is not divided."""
        return self.scale / (1 - self.dropout)


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                          update: Update) -> Tensor:
    """x (M, K), weight (N, K), bias (N,) or None -> (M, N)."""
    y = linear_reference(x, weight, bias)  # (M, N)
    if update.dropout:
        x = dropout_reference(x, update.dropout, update.seed)
    A, B, parts = A.to(x.dtype), B.to(x.dtype), len(update.offsets)
    for start, A_part, B_part in zip(update.offsets, A.chunk(parts), B.chunk(parts), strict=True):
        # the two thin products, not x (B A)^T: M r (K + n) multiplications instead of M K n
        y_part = update.scale * (x @ A_part.T) @ B_part.T  # (M, K) -> (M, r) -> (M, n)
        end = start + len(B_part)
        y = y + F.pad(y_part, (start, len(weight) - end))  # (M, n) -> (M, N)
    return y


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float,
                offsets: tuple[int, ...] = (0,), dropout: float = 0.0, kernel: str = "auto") -> Tensor:
    """x (..., K), weight (N, K), bias (N,) or None, A (P r, K), B (P n, r) -> (..., N).

    x, weight and bias have the compute dtype. A and B may be in fp32, and their gradients are then in fp32.
    dropout: applied to the input of the update alone, as in loralib.
    kernel: one of KERNELS. auto follows kernel_rule.json. Those that use Triton must be able to run (`check_kernel`),
    and compute in fp32, bf16 or fp16.
    """
    flat_x = x.reshape(-1, x.shape[-1])  # (..., K) -> (M, K)
    # The seed comes from torch's generator on x's device, so the mask depends on torch.manual_seed. It is a tensor that
    # the host never reads: that would wait for the GPU, and each replay of a CUDA graph draws a new seed.
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout else None
    update = Update(offsets, scale, dropout, seed)
    if ops.plain:
        y = lora_linear_reference(flat_x, weight, bias, A, B, update)
    else:
        kernel = choose(kernel, flat_x, B.shape[1], dropout)
        y = LoRAFunction.apply(flat_x, weight, bias, A, B, update, kernel)
    return unflatten_like(y, x)  # (M, N) -> (..., N)


class LoRAFunction(torch.autograd.Function):
    """The product with the frozen weight and its update as one step. As separate operations, autograd would keep
    drop(x), and its mask, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                update: Update, kernel: str) -> Tensor:
        ctx.dtype = A.dtype
        A, B = cast(A, x.dtype), cast(B, x.dtype)
        if kernel == "torch":
            y, h = forward(x, weight, bias, A, B, update)
        else:
            from minift.ops import lora_triton
            y, h = lora_triton.lora_forward(x, weight, bias, A, B, *update, kernel)
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.update, ctx.kernel = update, kernel
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # read saved_tensors once: under activation checkpointing, a second read is an error
        x, weight, A, B, h = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if ctx.kernel == "torch":
            dx, dA, dB = backward(dy, x, weight, A, B, h, ctx.update, need_dx, ctx.dtype)
        else:
            from minift.ops import lora_triton
            dx, dA, dB = lora_triton.lora_backward(dy, x, weight, A, B, h, *ctx.update, need_dx, ctx.kernel)
        dx = dx if need_dx else None  # Triton's operator returns an empty tensor
        dweight = dy.T @ x if need_dweight else None
        dbias = dy.sum(0) if need_dbias else None
        return dx, dweight, dbias, dA.to(ctx.dtype), dB.to(ctx.dtype), None, None


# ---- the implementation in PyTorch. A and B have the dtype of x. The thin matrices h and g hold the scale, so that no
# other tensor is multiplied by it.

def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, update: Update
            ) -> tuple[Tensor, Tensor]:
    """y (M, N) and h = s drop(x) A^T (M, P r)."""
    parts, s = len(update.offsets), update.total_scale
    y = matmul(x, weight.T, bias)  # (M, K) @ (K, N) -> (M, N)
    dropped_x = drop([x], update.dropout, update.seed)[0] if update.dropout else x
    h = x.new_empty(len(x), len(A))
    h.addmm_(dropped_x, A.T, beta=0, alpha=s)  # (M, K) @ (K, P r) -> (M, P r)
    for columns, h_part, B_part in zip(part_columns(update, B), h.chunk(parts, 1), B.chunk(parts), strict=True):
        y[:, columns].addmm_(h_part, B_part.T)  # (M, r) @ (r, n) -> (M, n)
    return y, h


def backward(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, h: Tensor, update: Update,
             need_dx: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (M, K), or None if it is not needed, dA and dB in `dtype`.

    With g_p = s dy_p B_p of every part p: dA = g^T drop(x), dB_p = dy_p^T h_p, dx = dy W + drop(g A).
    """
    parts, s = len(update.offsets), update.total_scale
    g = torch.empty_like(h)  # (M, P r)
    thin_parts = zip(h.chunk(parts, 1), g.chunk(parts, 1), B.chunk(parts), strict=True)
    dB_parts = []
    for columns, (h_part, g_part, B_part) in zip(part_columns(update, B), thin_parts, strict=True):
        dy_part = dy[:, columns]
        g_part.addmm_(dy_part, B_part, beta=0, alpha=s)  # (M, n) @ (n, r) -> (M, r)
        dB_parts.append(matmul_transposed(dy_part, h_part, dtype))  # (n, M) @ (M, r) -> (n, r)
    dB = torch.cat(dB_parts) if parts > 1 else dB_parts[0]  # (P n, r)

    if not update.dropout:
        dropped_x = x
    elif need_dx:  # one mask for both: computing it is the expensive part
        dropped_x, dropped_gA = drop([x, g @ A], update.dropout, update.seed)
    else:
        dropped_x = drop([x], update.dropout, update.seed)[0]
    dA = matmul_to(g.T, dropped_x, dtype)  # (P r, M) @ (M, K) -> (P r, K)

    dx = None
    if need_dx:
        dx = matmul(dy, weight)  # (M, N) @ (N, K) -> (M, K)
        if update.dropout:
            dx.add_(dropped_gA)
        else:
            dx.addmm_(g, A)
    return dx, dA, dB


def matmul_transposed(wide: Tensor, thin: Tensor, dtype: torch.dtype) -> Tensor:
    """wide^T thin, contiguous, as AdamW and autograd want a gradient: (M, n) and (M, r) -> (n, r) in `dtype`."""
    if wide.device.type == "cpu":  # faster as (thin^T wide)^T: the wide matrix stays as it is stored
        return (thin.T @ wide).T.to(dtype, memory_format=torch.contiguous_format)
    return matmul_to(wide.T, thin, dtype)


def part_columns(update: Update, B: Tensor) -> Iterator[slice]:
    """The outputs of each part."""
    n = len(B) // len(update.offsets)
    for start in update.offsets:
        yield slice(start, start + n)
