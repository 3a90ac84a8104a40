"""y = x W^T + b.

There are two fast versions. FastLinear is for bf16 on a CPU, where oneDNN computes the products and some shapes are
slow. CastLinear is for trained weights on a GPU, which are stored in fp32.
Letters in shape comments: M tokens, K inputs, N outputs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift import ops
from minift.device import uses_onednn_bf16
from minift.ops.cast import cast

SMALL_M = 32  # up to this number of tokens, as in decoding, the weight is the left factor
MIN_PARALLEL_N = 1280  # with at least about this number of outputs, oneDNN uses all threads for every M


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    # .to() returns the tensor itself if it has the dtype already
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N), computed in the dtype of x. Weight and bias may be in
    fp32, and their gradients are then in fp32."""
    has_other_dtype = weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)
    use_cast_linear = has_other_dtype and x.device.type != "cpu"
    if ops.plain or not (use_cast_linear or uses_onednn_bf16(x.device, x.dtype)):
        return linear_reference(x, weight, bias)
    flat_x = x.reshape(-1, x.shape[-1])  # (..., K) -> (M, K)
    if use_cast_linear:
        return unflatten_like(CastLinear.apply(flat_x, weight, bias), x)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if torch.is_grad_enabled():
        y = FastLinear.apply(flat_x, weight, bias)
    else:  # without an autograd Function, whose overhead is a twentieth of a decoding step
        y = matmul(flat_x, weight.T, bias)
    return unflatten_like(y, x)  # (M, N) -> (..., N)


def unflatten_like(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) with the leading dimensions of x (..., K). For x (M, K) it is y itself and no view, which FSDP2 warns of
    in a block's output."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class FastLinear(torch.autograd.Function):
    """F.linear with `matmul`, for x (M, K). Keeps x only if the weight trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight_trains = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if weight_trains else None, weight)
        return matmul(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        dx = matmul(dy, weight) if need_dx else None  # (M, N) @ (N, K) -> (M, K)
        dweight = None
        if need_dweight:
            dyT = dy.T  # (N, M)
            if dy.shape[1] < x.shape[1]:
                # oneDNN is slow with a transposed left factor. Where dy is narrow, a copy saves a third of the time.
                dyT = dyT.contiguous()
            dweight = dyT @ x  # (N, M) @ (M, K) -> (N, K)
        dbias = dy.sum(0) if need_dbias else None  # (M, N) -> (N,)
        return dx, dweight, dbias


class CastLinear(torch.autograd.Function):
    """F.linear for x (M, K), with the weight and the bias cast to its dtype. Their gradients are sums in fp32, and stay
    in it: they are not rounded to the dtype of x, and need no cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtype = weight.dtype
        weight_trains = ctx.needs_input_grad[1]
        weight = cast(weight, x.dtype)
        ctx.save_for_backward(x if weight_trains else None, weight)
        return F.linear(x, weight, None if bias is None else cast(bias, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        dx = dy @ weight if need_dx else None  # (M, N) @ (N, K) -> (M, K)
        dweight = matmul_to(dy.T, x, ctx.dtype) if need_dweight else None  # (N, M) @ (M, K) -> (N, K)
        dbias = dy.sum(0, dtype=torch.float32) if need_dbias else None  # (M, N) -> (N,)
        return dx, dweight, dbias


def matmul_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. From bf16 to fp32 a GPU writes its sums, which are in fp32, without rounding."""
    # meta: tensors without values, on which the tests count the kernels of a GPU
    if a.device.type in ("cuda", "meta") and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def matmul(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) @ matrix (K, N) + bias (N,) -> (M, N)."""
    M, N = len(x), matrix.shape[1]
    # True for weight.T of a weight that is stored as (N, K). False for `weight`, as in the backward pass, and for a
    # weight that is mapped from one of GPT-2's own files, which store (K, N).
    is_weight_view = matrix.T.is_contiguous()
    if not uses_onednn_bf16(x.device, x.dtype):
        return x @ matrix if bias is None else torch.addmm(bias, x, matrix)

    # oneDNN reorders the right factor in memory in each call. For few tokens the small factor goes there: (W x^T)^T is
    # 1.5 times as fast.
    if is_weight_view and M <= SMALL_M:
        y = (matrix.T @ x.T).T  # (N, K) @ (K, M) -> (N, M) -> (M, N)
        if bias is None:
            return y.contiguous()
        return torch.add(y, bias, out=x.new_empty(M, N))  # without `out` it would be stored like y, transposed

    # oneDNN runs 0.75 N <= M < 2 N on a single thread if N is below some 1,280.
    if N < MIN_PARALLEL_N and 0.75 * N <= M < 2 * N:
        return matmul_in_pieces(x, matrix, bias)
    if bias is None:
        return x @ matrix
    if is_weight_view:  # one call; addmm would first fill y with the bias
        return torch.ops.mkldnn._linear_pointwise(x, matrix.T, bias, "none", [], "")
    return torch.addmm(bias, x, matrix)


def matmul_in_pieces(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`matmul` for 0.75 N <= M < 2 N, in pieces of another shape, so that oneDNN uses all threads: 1.8 times
    as fast with 768 outputs on two cores with AMX."""
    M, N = len(x), matrix.shape[1]
    if M >= 1.5 * N:  # halve N: M is then at least three times as large
        piece_M, piece_N = M, math.ceil(N / 2)
    else:  # split M into pieces of less than 0.75 N
        piece_M, piece_N = max(1, 2 * N // 3), N
    y = x.new_empty(M, N)
    for x_piece, y_piece in zip(x.split(piece_M), y.split(piece_M), strict=True):
        for start in range(0, N, piece_N):
            columns = slice(start, start + piece_N)
            out = y_piece[:, columns]
            if bias is None:
                torch.mm(x_piece, matrix[:, columns], out=out)
            else:
                torch.addmm(bias[columns], x_piece, matrix[:, columns], out=out)
    return y
