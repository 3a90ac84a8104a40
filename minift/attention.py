"""Causal attention over rows of different lengths that lie end to end, without padding between them.

Letters in shape comments: N tokens of all rows, B rows, T the longest row, C = n_embd, nh heads, hs = C / nh.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels

# On a CPU, oneDNN compiles a kernel for each shape of a product and keeps it. Numbers of tokens are rounded
# up to multiples of this one, so that ragged rows make few shapes.
MULTIPLE = 16
CHUNK = 256  # queries of a row whose attention probabilities exist at one time


class Rows:
    """Where the tokens of B ragged rows are: in (N, ...), row after row, and in (B, T, ...), padded on the
    right. T (up to `most`) and N are rounded up to multiples of 16; what fills N up repeats the first token,
    and nothing may depend on it."""

    def __init__(self, lengths: list[int], most: int, device: torch.device):
        self.B, self.T = len(lengths), min(max(lengths) + -max(lengths) % MULTIPLE, most)
        self.slices = [slice(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)]
        self.starts = torch.tensor([row.start for row in self.slices], device=device)  # of each row, in N
        self.real = self.slices[-1].stop
        places = [torch.arange(n) + row * self.T for row, n in enumerate(lengths)]
        self.places = F.pad(torch.cat(places), (0, -self.real % MULTIPLE)).to(device)  # (N,), in (B T)

    def flat(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def padded(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), with zeros where there is no token."""
        empty = x.new_zeros(self.B * self.T, *x.shape[1:])
        return empty.index_copy(0, self.places[: self.real], x[: self.real]).unflatten(0, (self.B, self.T))


def attention(qkv: Tensor, rows: Rows, n_head: int, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v in each row: (N, 3C) -> (N, C). On a GPU this is torch's fused
    attention. On a CPU, where that takes up to 3 times as long in bf16 and 1.4 times in fp32 (8 rows of 64 to
    512 tokens, forward and backward), it is ChunkedAttention."""
    if qkv.device.type == "cpu":
        seed = torch.randint(2**62, ()) if dropout else None
        return ChunkedAttention.apply(qkv, rows, n_head, scale, dropout, seed)
    q, k, v = split_heads(rows.padded(qkv), n_head)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    return rows.flat(y.transpose(1, 2).flatten(2))


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Views of q, k and v, each (B, nh, T, hs), of (B, T, 3C)."""
    B, T, C = qkv.shape
    return qkv.view(B, T, 3, n_head, C // 3 // n_head).permute(2, 0, 3, 1, 4).unbind(0)


class ChunkedAttention(torch.autograd.Function):
    """Attention by plain products. Rows of up to CHUNK tokens go together, padded, and their probabilities
    are kept for the backward pass. Where one is longer, each row goes alone, without padding, and the
    backward pass makes the probabilities again: memory grows with the tokens, not with the square of T."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Rows, n_head: int, scale: float, dropout: float,
                seed: Tensor | None) -> Tensor:
        ctx.given, kept = (rows, n_head, scale, dropout), None
        if rows.T <= CHUNK:
            y, kept = attend(rows.padded(qkv), n_head, scale, dropout, seed)
            flat = rows.flat(y)
        else:
            flat = qkv.new_zeros(len(qkv), qkv.shape[1] // 3)
            for one in rows.slices:
                flat[one] = attend(qkv[None, one], n_head, scale, dropout, moved(seed, one.start))[0]
        ctx.save_for_backward(qkv, seed, kept)
        return flat

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, n_head, scale, dropout = ctx.given
        qkv, seed, kept = ctx.saved_tensors
        if rows.T <= CHUNK:
            dqkv = rows.flat(attend_backward(rows.padded(dy), rows.padded(qkv), kept, n_head, scale, dropout,
                                             seed))
            dqkv[rows.real :] = 0  # what fills N up
        else:
            dqkv = torch.zeros_like(qkv)
            for one in rows.slices:
                dqkv[one] = attend_backward(dy[None, one], qkv[None, one], None, n_head, scale, dropout,
                                            moved(seed, one.start))
        return dqkv, None, None, None, None, None


def attend(qkv: Tensor, n_head: int, scale: float, dropout: float, seed: Tensor | None
           ) -> tuple[Tensor, Tensor]:
    """(B, T, 3C) -> (B, T, C), a chunk of queries at a time, without the keys after its last query; and the
    last chunk's probabilities."""
    (B, T, _), (q, k, v) = qkv.shape, (part.flatten(0, 1) for part in split_heads(qkv, n_head))
    y = torch.empty_like(q)  # (B nh, T, hs)
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        weights = probabilities(q, k, start, end, scale)  # (B nh, end - start, end)
        y[:, start:end] = dropped(weights, dropout, moved(seed, start)) @ v[:, :end]
    return y.unflatten(0, (B, n_head)).transpose(1, 2).flatten(2), weights


def attend_backward(dy: Tensor, qkv: Tensor, kept: Tensor | None, n_head: int, scale: float, dropout: float,
                    seed: Tensor | None) -> Tensor:
    """dy (B, T, C) -> dqkv (B, T, 3C); `kept` are the probabilities, or None to make them again."""
    T, (q, k, v) = qkv.shape[1], (part.flatten(0, 1) for part in split_heads(qkv, n_head))
    dy = dy.unflatten(2, (n_head, -1)).transpose(1, 2).flatten(0, 1)  # (B nh, T, hs)
    sums = qkv.dtype if T <= CHUNK else torch.promote_types(qkv.dtype, torch.float32)
    dqkv = torch.zeros_like(qkv, dtype=sums)
    dq, dk, dv = split_heads(dqkv, n_head)  # (B, nh, T, hs)
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        weights = probabilities(q, k, start, end, scale) if kept is None else kept
        left = dropped(weights, dropout, moved(seed, start))
        dv[:, :, :end] += (left.transpose(1, 2) @ dy[:, start:end]).view_as(dv[:, :, :end])
        dweights = dropped(dy[:, start:end] @ v[:, :end].transpose(1, 2), dropout, moved(seed, start))
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(scale)
        dq[:, :, start:end] = (dscores @ k[:, :end]).view_as(dq[:, :, start:end])
        dk[:, :, :end] += (dscores.transpose(1, 2) @ q[:, start:end]).view_as(dk[:, :, :end])
    return dqkv.to(qkv.dtype)


def probabilities(q: Tensor, k: Tensor, start: int, end: int, scale: float) -> Tensor:
    """What the queries start..end make of the keys 0..end."""
    mask = q.new_full((end - start, end), -torch.inf).triu(1 + start)
    return torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale).softmax(-1)


def moved(seed: Tensor | None, place: int) -> Tensor | None:
    """A seed for what begins at another place: of a row in N, and of a chunk in its row."""
    return None if seed is None else seed + place


def dropped(weights: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """`weights` after dropout; the same elements fall out whenever the seed is the same."""
    if not dropout:
        return weights
    return kernels.dropped([weights.flatten(0, 1)], dropout, seed)[0].view_as(weights) / (1 - dropout)
