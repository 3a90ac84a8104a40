"""Causal attention over packed rows: rows of different lengths that lie end to end in one tensor.

Letters in shape comments: N tokens of all rows, B rows, T tokens of the longest row, C = n_embd, nh heads,
hs = C / nh. In a group of rows that are attended together, b is their number.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift import ops
from minift.ops.dropout import drop

# oneDNN compiles one kernel for each shape of a matrix product. With row lengths and their total rounded up,
# ragged batches share a few shapes.
ROUND_LEN = 32
ROUND_TOTAL = 128
QUERY_BLOCK = 512  # queries of a row whose probabilities exist at one time; shorter rows keep theirs
MAX_SCORES = 2**20  # probabilities of the rows that are attended together: small models save calls this way


@dataclass(frozen=True)
class PackedRows:
    """Where B ragged rows lie in (N, ...) tensors: row after row, then some filler.

    seqlens: tokens of each row, on the host. cu_seqlens (B + 1,): where each row begins, and the last one ends.
    row_ids (N,): the row of each token. positions (N,): the token's position in its row.
    """

    seqlens: list[int]
    cu_seqlens: Tensor
    row_ids: Tensor
    positions: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without the filler."""
        return sum(self.seqlens)

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens)

    @property
    def slices(self) -> list[slice]:
        """Each row's place in the N tokens."""
        found, start = [], 0
        for seqlen in self.seqlens:
            found.append(slice(start, start + seqlen))
            start += seqlen
        return found


def round_up(number: int, multiple: int) -> int:
    return number + -number % multiple


def padded_length(seqlens: list[int], round_shapes: bool) -> int:
    """N for rows of these lengths. Every row must be followed by the tokens that round its length up; with
    `round_shapes` large totals are rounded further."""
    start = longest = 0
    for seqlen in seqlens:
        longest = max(longest, start + round_up(seqlen, ROUND_LEN))
        start += seqlen
    few = round_shapes and longest > 4 * ROUND_TOTAL
    return round_up(longest, ROUND_TOTAL if few else ROUND_LEN)


def attention_reference(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v within each row, (N, 3C) -> (N, C)."""
    y = torch.zeros_like(qkv[:, : qkv.shape[1] // 3])
    for row in rows.slices:
        q, k, v = qkv[row].unflatten(1, (3, n_head, -1)).permute(1, 2, 0, 3)  # each (nh, T, hs)
        scores = scale * q @ k.transpose(1, 2)  # (nh, T, T)
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=qkv.device).triu(1)
        probs = F.dropout(scores.masked_fill(future, -torch.inf).softmax(-1), dropout)
        y = y.index_put((torch.arange(row.start, row.stop),), (probs @ v).transpose(0, 1).flatten(1))
    return y


def attention(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """`attention_reference`, faster. The filler's output is zero, or unused.

    On a CPU with gradients: WindowedAttention, since torch's fused attention takes 27 ms backward where plain
    products take 4 (8 rows of 167 tokens in bf16, two cores with AMX). Without gradients: torch's, row by row.
    On a GPU: torch's, with rows padded to the longest.
    Dropout masks differ from the reference's: each version draws its own.
    """
    if ops.plain:
        return attention_reference(qkv, rows, n_head, scale, dropout)
    if qkv.device.type != "cpu":
        return padded_attention(qkv, rows, n_head, scale, dropout)
    if dropout or (qkv.requires_grad and torch.is_grad_enabled()):
        seed = torch.randint(2**62, ()) if dropout else None
        return WindowedAttention.apply(qkv, rows, n_head, scale, dropout, seed)
    heads = qkv.unflatten(1, (3, n_head, -1)).permute(1, 2, 0, 3)  # (3, nh, N, hs)
    y = qkv.new_zeros(len(qkv), n_head, heads.shape[-1])  # (N, nh, hs)
    for row in rows.slices:
        q, k, v = heads[:, None, :, row]  # each (1, nh, T, hs)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        y[row] = out[0].transpose(0, 1)
    return y.flatten(1)


def padded_attention(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """torch's fused attention of all rows at once, each padded to the longest."""
    B, T, real = len(rows.seqlens), rows.max_seqlen, rows.num_tokens
    padded_index = rows.row_ids * T + rows.positions  # (N,), into (B T)
    padded = qkv.new_zeros(B * T, qkv.shape[1]).index_copy(0, padded_index[:real], qkv[:real])
    q, k, v = padded.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    return y.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, padded_index)  # (B, nh, T, hs) -> (N, C)


class WindowedAttention(torch.autograd.Function):
    """Attention by plain matrix products on a CPU.

    Each row is extended to a rounded length, its window. The extra keys are masked, the extra outputs are
    dropped, and their gradients are zero. Rows with windows of one length form a group and share each product.
    Probabilities are kept for the backward pass if they are one query block; longer rows recompute theirs, so
    memory grows with the tokens and not with the square of a row's length. Windows and scores are written into
    a workspace that the next group uses again while it is in the caches.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float,
                seed: Tensor | None) -> Tensor:
        groups, mask = group_rows(rows, n_head), causal_mask(rows, qkv)
        y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        y[rows.num_tokens :] = 0
        workspace, scores = allocate_workspace(4, groups, n_head, y)  # q, k, v, y
        saved_probs = []
        for group in groups:
            heads = view_windows(workspace, group, y.shape[1], n_head)  # (4, b, nh, T, hs)
            gather_heads(qkv.unflatten(1, (3, n_head, -1)), group, heads[:3])
            probs = attend(*heads.flatten(1, 2), scores, mask, scale, dropout,
                           offset_seed(seed, group[0].start))
            saved_probs.append(probs)
            scatter_heads(heads[3:], group, y.unflatten(1, (1, n_head, -1)))
        ctx.save_for_backward(seed, qkv, *saved_probs)
        ctx.args = rows, groups, n_head, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, groups, n_head, scale, dropout = ctx.args
        seed, qkv, *saved_probs = ctx.saved_tensors
        mask, dqkv = causal_mask(rows, qkv), torch.empty_like(qkv)
        dqkv[rows.num_tokens :] = 0
        workspace, scores = allocate_workspace(7, groups, n_head, dy)  # q, k, v, dy, dq, dk, dv
        for group, probs in zip(groups, saved_probs, strict=True):
            heads = view_windows(workspace, group, dy.shape[1], n_head)  # (7, b, nh, T, hs)
            gather_heads(qkv.unflatten(1, (3, n_head, -1)), group, heads[:3])
            gather_heads(dy.unflatten(1, (1, n_head, -1)), group, heads[3:4], zero_extra=True)
            attend_backward(*heads.flatten(1, 2), probs, scores, mask, scale, dropout,
                            offset_seed(seed, group[0].start))
            scatter_heads(heads[4:], group, dqkv.unflatten(1, (3, n_head, -1)))
        return dqkv, None, None, None, None, None


def group_rows(rows: PackedRows, n_head: int) -> list[list[slice]]:
    """Rows with windows of one length together, as far as MAX_SCORES allows. Group sizes are powers of two,
    so that there are few shapes."""
    same_window: dict[int, list[slice]] = {}
    for row in rows.slices:
        same_window.setdefault(window_length(row), []).append(row)
    groups = []
    for T, members in same_window.items():
        most = max(1, MAX_SCORES // (n_head * T * min(T, QUERY_BLOCK)))
        while members:
            count = min(most, len(members))
            count = 1 << count.bit_length() - 1  # the largest power of two up to it
            groups.append(members[:count])
            members = members[count:]
    return groups


def window_length(row: slice) -> int:
    return round_up(row.stop - row.start, ROUND_LEN)


def causal_mask(rows: PackedRows, like: Tensor) -> Tensor:
    """(T, T) of one query block: 0 where a query may attend, -inf where it may not."""
    T = min(round_up(rows.max_seqlen, ROUND_LEN), QUERY_BLOCK)
    return like.new_full((T, T), -torch.inf).triu(1)


def allocate_workspace(parts: int, groups: list[list[slice]], n_head: int,
                       like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the windows of any one group, for `parts` tensors as wide as `like` (N, C), and for its
    scores."""
    most_tokens = most_scores = 0
    for group in groups:
        b, T = len(group), window_length(group[0])
        most_tokens = max(most_tokens, b * T)
        most_scores = max(most_scores, b * n_head * min(T, QUERY_BLOCK) * T)
    return like.new_empty(parts, most_tokens * like.shape[1]), like.new_empty(most_scores)


def view_windows(workspace: Tensor, group: list[slice], C: int, n_head: int) -> Tensor:
    """The part of the workspace that a group uses, as (parts, b, nh, T, hs)."""
    b = len(group)
    used = workspace[:, : b * window_length(group[0]) * C]
    return used.view(len(workspace), b, n_head, -1, C // n_head)


def gather_heads(x: Tensor, group: list[slice], out: Tensor, zero_extra: bool = False) -> None:
    """Copy the rows' windows of x (N, parts, nh, hs) into `out` (parts, b, nh, T, hs). The tokens beyond a
    row's end are those that follow it in x, or zeros."""
    T = out.shape[3]
    for i, row in enumerate(group):
        end = row.stop if zero_extra else row.start + T
        out[:, i, :, : end - row.start] = x[row.start : end].permute(1, 2, 0, 3)
        if zero_extra:
            out[:, i, :, end - row.start :] = 0


def scatter_heads(x: Tensor, group: list[slice], out: Tensor) -> None:
    """Copy the rows' own tokens of x (parts, b, nh, T, hs) into `out` (N, parts, nh, hs)."""
    for i, row in enumerate(group):
        out[row] = x[:, i, :, : row.stop - row.start].permute(2, 0, 1, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, workspace: Tensor, mask: Tensor, scale: float,
           dropout: float, seed: Tensor | None) -> Tensor | None:
    """q, k, v -> out, each (b nh, T, hs), one query block at a time, without the keys after its last query.
    Returns the probabilities if there was one block."""
    T = q.shape[1]
    keep = T <= QUERY_BLOCK
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        probs = probabilities(q, k, start, end, workspace, mask, scale, keep)  # (b nh, end - start, end)
        torch.bmm(dropout_probs(probs, dropout, offset_seed(seed, start)), v[:, :end], out=out[:, start:end])
    return probs if keep else None


def attend_backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
                    saved_probs: Tensor | None, workspace: Tensor, mask: Tensor, scale: float, dropout: float,
                    seed: Tensor | None) -> None:
    """q, k, v, dy -> dq, dk, dv, each (b nh, T, hs). `saved_probs`: None to recompute them."""
    T = q.shape[1]
    for start in reversed(range(0, T, QUERY_BLOCK)):  # the last block sees every key: it initialises dk and dv
        end = min(start + QUERY_BLOCK, T)
        beta = 0 if end == T else 1  # 0: overwrite, 1: add to what later blocks left
        block_seed = offset_seed(seed, start)
        probs = saved_probs
        if probs is None:
            probs = probabilities(q, k, start, end, workspace, mask, scale, keep=True)
        dropped_probs = dropout_probs(probs, dropout, block_seed)
        add_matmul(dv[:, :end], dropped_probs.transpose(1, 2), dy[:, start:end], beta)
        dscores = workspace[: probs.numel()].view_as(probs)
        torch.bmm(dy[:, start:end], v[:, :end].transpose(1, 2), out=dscores)
        dscores = dropout_probs(dscores, dropout, block_seed)
        torch._softmax_backward_data(dscores, probs, -1, probs.dtype, grad_input=dscores)
        add_matmul(dq[:, start:end], dscores, k[:, :end], 0, scale)
        add_matmul(dk[:, :end], dscores.transpose(1, 2), q[:, start:end], beta, scale)


def add_matmul(out: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float = 1.0) -> None:
    """out <- beta out + alpha a b, in place."""
    torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)


def probabilities(q: Tensor, k: Tensor, start: int, end: int, workspace: Tensor, mask: Tensor, scale: float,
                  keep: bool) -> Tensor:
    """softmax(scale q[start:end] k[:end]^T + mask); a new tensor with `keep`, else in the workspace."""
    block_mask = mask[: end - start, : end - start]
    if start:
        block_mask = F.pad(block_mask, (start, 0))  # all keys before the block are visible
    shape = len(q), end - start, end
    scores = workspace[: math.prod(shape)].view(shape)
    torch.baddbmm(block_mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale, out=scores)
    return scores.softmax(-1) if keep else torch.softmax(scores, -1, out=scores)


def offset_seed(seed: Tensor | None, offset: int) -> Tensor | None:
    """A different dropout seed for each group of rows and each query block."""
    return None if seed is None else seed + offset


def dropout_probs(probs: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Dropout with a mask that depends on the seed alone, so that the backward pass draws the same one."""
    if not dropout:
        return probs
    return drop([probs.flatten(0, 1)], dropout, seed)[0].view_as(probs) / (1 - dropout)
