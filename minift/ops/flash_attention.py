"""Causal attention over packed rows on an NVIDIA GPU, with torch's own FlashAttention-2 (Dao 2023).

Letters in shape comments as in attention.py. Not run on a GPU yet: tests check the call with a stand-in, and with
tensors that have no values.
"""

import functools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)  # the kernels have no others
MAX_HEAD_SIZE = 256
# The operator behind scaled_dot_product_attention, with a gradient for cu_seqlens too (torch's derivatives.yaml).
# torch.nn.attention.varlen calls it, but has no dropout and no stable signature.
flash_op = torch.ops.aten._flash_attention_forward


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether the kernels are in this build of torch and run on this GPU: Ampere or later."""
    if torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def takes_flash(qkv: Tensor, n_head: int) -> bool:
    """Whether `flash_attention` can take qkv (N, 3C)."""
    if not qkv.is_cuda or qkv.dtype not in DTYPES:
        return False
    head_size = qkv.shape[1] // (3 * n_head)
    return head_size % 8 == 0 and head_size <= MAX_HEAD_SIZE and has_flash(qkv.device)


def flash_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, n_head: int, scale: float,
                    dropout: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v within each row, (N, 3C) -> (N, C), without padding between the rows.

    cu_seqlens: int32, from 0 to N: the output of a token outside all rows, and its gradient, would have no values.
    max_seqlen: the tokens of the longest row, or more.
    """
    # views, no copies: the kernels take any strides of tokens and heads
    q, k, v = qkv.unflatten(1, (3, n_head, -1)).unbind(1)  # each (N, nh, hs)
    causal, debug_mask = True, False
    y, *_ = flash_op(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, causal, debug_mask, scale=scale)
    return y.flatten(1)  # (N, nh, hs) -> (N, C)
