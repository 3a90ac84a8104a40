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
# The most probabilities of a group of rows that are attended together. With a small model, one call then takes many
# rows.
MAX_SCORES = 2**20


@dataclass(frozen=True)
class PackedRows:
    """The layout of B ragged rows in (N, ...) tensors: row after row, then some filler tokens.

    N includes the filler: it rounds N up, and its results are never used.
    """

    seqlens: list[int]  # the tokens of each row; on the host, so that no GPU must be waited for
    cu_seqlens: Tensor  # (B + 1,) int32: the start of each row, and the end of the last
    row_ids: Tensor  # (N,): the row of each token
    positions: Tensor  # (N,): the position of each token in its row

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without the filler."""
        return sum(self.seqlens)

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens)

    @property
    def slices(self) -> list[slice]:
        """The tokens of each row, as a slice of the N tokens."""
        slices = []
        start = 0
        for seqlen in self.seqlens:
            slices.append(slice(start, start + seqlen))
            start += seqlen
        return slices


def round_up(number: int, multiple: int) -> int:
    return number + -number % multiple


def padded_length(seqlens: list[int], round_shapes: bool) -> int:
    """N, the tokens of rows of these lengths with the filler. `round_shapes` rounds large totals further."""
    # WindowedAttention reads each row with its length rounded up, and must not read beyond the N tokens. Not always
    # the last row decides: rows of 33 and 1 tokens need 64 tokens for the first.
    end = start = 0
    for seqlen in seqlens:
        end = max(end, start + round_up(seqlen, ROUND_LEN))
        start += seqlen
    # a small batch would become noticeably larger
    if round_shapes and end > 4 * ROUND_TOTAL:
        return round_up(end, ROUND_TOTAL)
    return round_up(end, ROUND_LEN)


def attention_reference(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v within each row, (N, 3C) -> (N, C)."""
    y = torch.zeros_like(qkv[:, : qkv.shape[1] // 3])
    for row in rows.slices:
        q, k, v = qkv[row].unflatten(1, (3, n_head, -1)).permute(1, 2, 0, 3)  # (T, 3C) -> 3 x (nh, T, hs)
        scores = scale * q @ k.transpose(1, 2)  # (nh, T, T)
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=qkv.device).triu(1)  # keys after the query
        probs = F.dropout(scores.masked_fill(future, -torch.inf).softmax(-1), dropout)
        out = (probs @ v).transpose(0, 1).flatten(1)  # (nh, T, hs) -> (T, C)
        y = y.index_put((torch.arange(row.start, row.stop),), out)
    return y


def attention(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """`attention_reference`, faster: (N, 3C) -> (N, C). The output of the filler has no meaning.

    Each version draws its own dropout mask, so with dropout the results differ from the reference's.
    """
    if ops.plain:
        return attention_reference(qkv, rows, n_head, scale, dropout)
    if qkv.device.type != "cpu":
        return padded_attention(qkv, rows, n_head, scale, dropout)
    # torch's fused attention takes 27 ms backward on a CPU where plain products take 4 (8 rows of 167 tokens in
    # bf16, two cores with AMX)
    if dropout or (qkv.requires_grad and torch.is_grad_enabled()):
        seed = torch.randint(2**62, ()) if dropout else None  # 2**62: offset_seed adds to it without overflow
        return WindowedAttention.apply(qkv, rows, n_head, scale, dropout, seed)

    # without gradients: torch's fused attention, one row at a time, needs neither windows nor padding
    heads = qkv.unflatten(1, (3, n_head, -1)).permute(1, 2, 0, 3)  # (N, 3C) -> (3, nh, N, hs)
    y = qkv.new_zeros(len(qkv), n_head, heads.shape[-1])  # (N, nh, hs)
    for row in rows.slices:
        q, k, v = heads[:, None, :, row]  # each (1, nh, T, hs): torch wants a batch dimension
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        y[row] = out[0].transpose(0, 1)
    return y.flatten(1)


def padded_attention(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """torch's fused attention of all rows at once, each padded to the longest."""
    B, T, num_tokens = len(rows.seqlens), rows.max_seqlen, rows.num_tokens
    padded_index = rows.row_ids * T + rows.positions  # (N,): each token's index in (B T)
    padded = qkv.new_zeros(B * T, qkv.shape[1])  # (B T, 3C)
    # without the filler, whose indices repeat that of a real token
    padded = padded.index_copy(0, padded_index[:num_tokens], qkv[:num_tokens])
    q, k, v = padded.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    # padding lies behind a row's tokens, so the causal mask hides it from them
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    y = y.transpose(1, 2).flatten(2).flatten(0, 1)  # (B, nh, T, hs) -> (B T, C)
    return y.index_select(0, padded_index)  # (N, C)


class WindowedAttention(torch.autograd.Function):
    """Attention by plain matrix products on a CPU.

    - A row's window is the row, extended to a rounded length by the tokens that follow it. The causal mask hides the
      extra keys, the extra outputs are dropped, and their gradients are zero.
    - Rows with windows of the same length form a group, and share each matrix product.
    - Rows of one query block keep their probabilities for the backward pass. Longer rows recompute theirs, so memory
      grows with the number of tokens and not with the square of a row's length.
    - All groups use the same workspace for windows and scores, one after another: it stays in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float,
                seed: Tensor | None) -> Tensor:
        groups = group_rows(rows, n_head)
        mask = causal_mask(rows, qkv)
        y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # (N, C)
        y[rows.num_tokens :] = 0  # the filler; every other token is written below
        workspace, scores = allocate_workspace(4, groups, n_head, y)  # q, k, v, y
        saved_probs = []
        for group in groups:
            heads = view_windows(workspace, group, y.shape[1], n_head)  # (4, b, nh, T, hs)
            gather_heads(qkv.unflatten(1, (3, n_head, -1)), group, heads[:3])
            group_seed = offset_seed(seed, group[0].start)
            probs = attend(*heads.flatten(1, 2), scores, mask, scale, dropout, group_seed)
            saved_probs.append(probs)
            scatter_heads(heads[3:], group, y.unflatten(1, (1, n_head, -1)))
        # not the heads: gathering them again from qkv is cheap, and they are as large as qkv
        ctx.save_for_backward(seed, qkv, *saved_probs)
        ctx.args = rows, groups, n_head, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, groups, n_head, scale, dropout = ctx.args
        seed, qkv, *saved_probs = ctx.saved_tensors
        mask = causal_mask(rows, qkv)
        dqkv = torch.empty_like(qkv)  # (N, 3C)
        dqkv[rows.num_tokens :] = 0
        workspace, scores = allocate_workspace(7, groups, n_head, dy)  # q, k, v, dy, dq, dk, dv
        for group, probs in zip(groups, saved_probs, strict=True):
            heads = view_windows(workspace, group, dy.shape[1], n_head)  # (7, b, nh, T, hs)
            gather_heads(qkv.unflatten(1, (3, n_head, -1)), group, heads[:3])
            # the tokens beyond a row belong to the next row: here they must not add to the gradients
            gather_heads(dy.unflatten(1, (1, n_head, -1)), group, heads[3:4], zero_extra=True)
            group_seed = offset_seed(seed, group[0].start)  # as in the forward pass
            attend_backward(*heads.flatten(1, 2), probs, scores, mask, scale, dropout, group_seed)
            scatter_heads(heads[4:], group, dqkv.unflatten(1, (3, n_head, -1)))
        return dqkv, None, None, None, None, None


def group_rows(rows: PackedRows, n_head: int) -> list[list[slice]]:
    """Groups of rows whose windows have the same length, with at most MAX_SCORES probabilities. Their sizes are powers
    of two, so that there are few shapes."""
    same_window: dict[int, list[slice]] = {}
    for row in rows.slices:
        same_window.setdefault(window_length(row), []).append(row)
    groups = []
    for T, members in same_window.items():
        most_rows = max(1, MAX_SCORES // (n_head * T * min(T, QUERY_BLOCK)))
        while members:
            count = min(most_rows, len(members))
            count = 1 << (count.bit_length() - 1)  # the largest power of two that is not larger
            groups.append(members[:count])
            members = members[count:]
    return groups


def window_length(row: slice) -> int:
    """T, the tokens of a row with its length rounded up."""
    return round_up(row.stop - row.start, ROUND_LEN)


def causal_mask(rows: PackedRows, like: Tensor) -> Tensor:
    """(T, T) for the queries of one block: 0 for the keys that a query sees, -inf for later ones."""
    T = min(round_up(rows.max_seqlen, ROUND_LEN), QUERY_BLOCK)
    return like.new_full((T, T), -torch.inf).triu(1)


def allocate_workspace(parts: int, groups: list[list[slice]], n_head: int,
                       like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory that is large enough for any one group: for the windows of `parts` tensors, each of them as wide as
    `like` (N, C), and for the scores."""
    most_tokens = most_scores = 0
    for group in groups:
        b, T = len(group), window_length(group[0])
        most_tokens = max(most_tokens, b * T)
        most_scores = max(most_scores, b * n_head * min(T, QUERY_BLOCK) * T)
    return like.new_empty(parts, most_tokens * like.shape[1]), like.new_empty(most_scores)


def view_windows(workspace: Tensor, group: list[slice], C: int, n_head: int) -> Tensor:
    """The part of the workspace that a group uses, as (parts, b, nh, T, hs)."""
    b, T = len(group), window_length(group[0])
    used = workspace[:, : b * T * C]
    return used.view(len(workspace), b, n_head, T, C // n_head)


def gather_heads(x: Tensor, group: list[slice], out: Tensor, zero_extra: bool = False) -> None:
    """Copy the rows' windows of x (N, parts, nh, hs) into `out` (parts, b, nh, T, hs). The tokens beyond the end of
    a row are those that follow it in x, or zeros with `zero_extra`."""
    T = out.shape[3]
    for i, row in enumerate(group):
        end = row.stop if zero_extra else row.start + T
        count = end - row.start
        # (count, parts, nh, hs) -> (parts, nh, count, hs)
        out[:, i, :, :count] = x[row.start : end].permute(1, 2, 0, 3)
        if zero_extra:
            out[:, i, :, count:] = 0


def scatter_heads(x: Tensor, group: list[slice], out: Tensor) -> None:
    """Copy the tokens of the rows, without those beyond their ends, from x (parts, b, nh, T, hs) into `out`
    (N, parts, nh, hs)."""
    for i, row in enumerate(group):
        seqlen = row.stop - row.start
        out[row] = x[:, i, :, :seqlen].permute(2, 0, 1, 3)  # (parts, nh, seqlen, hs) -> (seqlen, parts, nh, hs)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, workspace: Tensor, mask: Tensor, scale: float,
           dropout: float, seed: Tensor | None) -> Tensor | None:
    """q, k, v -> out, each (b nh, T, hs), one query block at a time. Returns the probabilities if there was one
    block, else None."""
    T = q.shape[1]
    keep = T <= QUERY_BLOCK
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        # keys after the block's last query are all masked, so they are left out
        probs = probabilities(q, k, start, end, workspace, mask, scale, keep)  # (b nh, end - start, end)
        dropped_probs = dropout_probs(probs, dropout, offset_seed(seed, start))
        torch.bmm(dropped_probs, v[:, :end], out=out[:, start:end])
    return probs if keep else None


def attend_backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
                    saved_probs: Tensor | None, workspace: Tensor, mask: Tensor, scale: float, dropout: float,
                    seed: Tensor | None) -> None:
    """q, k, v, dy -> dq, dk, dv, each (b nh, T, hs). `saved_probs`: None to recompute them."""
    T = q.shape[1]
    # backwards, since the last block sees every key: it writes all of dk and dv, and the others add to them
    for start in reversed(range(0, T, QUERY_BLOCK)):
        end = min(start + QUERY_BLOCK, T)
        beta = 0 if end == T else 1  # 0: overwrite, 1: add
        block_seed = offset_seed(seed, start)
        probs = saved_probs
        if probs is None:
            probs = probabilities(q, k, start, end, workspace, mask, scale, keep=True)
        # out = drop(probs) v
        dropped_probs = dropout_probs(probs, dropout, block_seed)
        add_matmul(dv[:, :end], dropped_probs.transpose(1, 2), dy[:, start:end], beta)
        dprobs = workspace[: probs.numel()].view_as(probs)  # (b nh, end - start, end)
        torch.bmm(dy[:, start:end], v[:, :end].transpose(1, 2), out=dprobs)
        dprobs = dropout_probs(dprobs, dropout, block_seed)
        # probs = softmax(scores); the gradient of the scores is written over that of the probabilities
        dscores = dprobs
        torch._softmax_backward_data(dprobs, probs, -1, probs.dtype, grad_input=dscores)
        # scores = scale q k^T + mask
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
        block_mask = F.pad(block_mask, (start, 0))  # every query of the block sees all keys before it
    shape = len(q), end - start, end  # (b nh, queries, keys)
    scores = workspace[: math.prod(shape)].view(shape)
    torch.baddbmm(block_mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale, out=scores)
    return scores.softmax(-1) if keep else torch.softmax(scores, -1, out=scores)


def offset_seed(seed: Tensor | None, offset: int) -> Tensor | None:
    """A different dropout seed for each group of rows and each query block; `offset` is the start of its tokens."""
    return None if seed is None else seed + offset


def dropout_probs(probs: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Dropout with a mask that depends on the seed alone, so that the backward pass draws the same one."""
    if not dropout:
        return probs
    flat = probs.flatten(0, 1)  # (b nh, queries, keys) -> (b nh queries, keys): drop takes matrices
    dropped = drop([flat], dropout, seed)[0].view_as(probs)
    return dropped / (1 - dropout)
