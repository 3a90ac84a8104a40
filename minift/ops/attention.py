"""Causal attention over packed rows: rows of different lengths that lie end to end in one tensor.

Letters in shape comments: N tokens of all rows, B rows, T tokens of the longest row, C = n_embd, nh heads,
hs = C / nh. In a group of rows that are attended together, b is their number.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift import ops
from minift.ops.dropout import drop
from minift.ops.flash_attention import flash_attention, takes_flash

# oneDNN compiles one kernel for each shape of a matrix product. With row lengths and their total rounded up,
# ragged batches share a few shapes.
ROUND_LEN = 32
ROUND_TOTAL = 128
ROUND_PADDED = 64  # the same for cuDNN, which makes a plan for each length of the padded rows
QUERY_BLOCK = 512  # queries of a row whose probabilities exist at one time; shorter rows keep theirs
# The most probabilities of a group of rows that are attended together. With a small model, one call then takes many
# rows.
MAX_SCORES = 2**20


@dataclass(frozen=True)
class PackedRows:
    """The layout of B ragged rows in (N, ...) tensors: row after row, then some filler tokens.

    N includes the filler: it rounds N up, and its results are never used. On a GPU the filler is one more row.
    """

    seqlens: list[int]  # the tokens of each row; on the host, so that no GPU must be waited for
    cu_seqlens: Tensor  # (B + 2,) int32: the start of each row and of the filler, and N
    max_cu_seqlen: int  # the longest row of cu_seqlens, which has the filler too; in a CUDA graph it may be more
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
    if takes_flash(qkv, n_head):
        return flash_attention(qkv, rows.cu_seqlens, rows.max_cu_seqlen, n_head, scale, dropout)
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
    """torch's fused attention of all rows at once, each padded to the longest: for fp32, and for GPUs and builds of
    torch without FlashAttention."""
    # only T is rounded: there are few B, those of full batches and of the last of an epoch
    B, T, num_tokens = len(rows.seqlens), round_up(rows.max_seqlen, ROUND_PADDED), rows.num_tokens
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
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float,
                seed: Tensor | None) -> Tensor:
        groups = group_rows(rows, n_head)
        mask = causal_mask(rows, qkv)
        y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # (N, C)
        y[rows.num_tokens :] = 0  # the filler; every other token is written below
        saved_probs = []  # of each block of each group
        for group in groups:
            q, k, v = gather_heads(qkv, group, 3, n_head)  # each (b nh, T, hs)
            out = torch.empty_like(q)
            blocks = query_blocks(group)
            for block, keys in blocks:
                probs = probabilities(q[:, block], k[:, keys], mask[block, keys], scale)  # (b nh, queries, keys)
                block_seed = offset_seed(seed, group, block)
                torch.bmm(dropout_probs(probs, dropout, block_seed), v[:, keys], out=out[:, block])
                saved_probs.append(probs if len(blocks) == 1 else None)
            scatter_heads(out[None], group, y, n_head)
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
        for group in reversed(groups):  # as saved_probs is read from its end
            q, k, v = gather_heads(qkv, group, 3, n_head)
            # the tokens beyond a row belong to the next row: here they must not add to the gradients
            [dout] = gather_heads(dy, group, 1, n_head, zero_extra=True)
            dheads = q.new_empty(3, *q.shape)
            dq, dk, dv = dheads
            # the last block first: it sees all keys, so it writes all of dk and dv, and the others add to them
            for block, keys in reversed(query_blocks(group)):
                beta = 0 if keys.stop == q.shape[1] else 1
                probs = saved_probs.pop()
                if probs is None:
                    probs = probabilities(q[:, block], k[:, keys], mask[block, keys], scale)
                block_seed = offset_seed(seed, group, block)  # as in the forward pass
                # out = drop(probs) v
                dropped_probs = dropout_probs(probs, dropout, block_seed)
                add_matmul(dv[:, keys], dropped_probs.transpose(1, 2), dout[:, block], beta)
                dprobs = dropout_probs(dout[:, block] @ v[:, keys].transpose(1, 2), dropout, block_seed)
                # probs = softmax(scores); the gradient of the scores is written over that of the probabilities
                dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype, grad_input=dprobs)
                # scores = scale q k^T + mask
                add_matmul(dq[:, block], dscores, k[:, keys], 0, scale)
                add_matmul(dk[:, keys], dscores.transpose(1, 2), q[:, block], beta, scale)
            scatter_heads(dheads, group, dqkv, n_head)
        return dqkv, None, None, None, None, None


def group_rows(rows: PackedRows, n_head: int) -> list[list[slice]]:
    """Groups of rows whose windows have the same length, with at most MAX_SCORES probabilities. Their sizes are powers
    of two, so that there are few shapes."""
    same_window: dict[int, list[slice]] = {}
    for row in rows.slices:
        same_window.setdefault(window_length([row]), []).append(row)
    groups = []
    for T, members in same_window.items():
        most_rows = max(1, MAX_SCORES // (n_head * T * min(T, QUERY_BLOCK)))
        while members:
            count = min(most_rows, len(members))
            count = 1 << (count.bit_length() - 1)  # the largest power of two that is not larger
            groups.append(members[:count])
            members = members[count:]
    return groups


def window_length(group: list[slice]) -> int:
    """T, the tokens of a row of the group with its length rounded up."""
    return round_up(group[0].stop - group[0].start, ROUND_LEN)


def query_blocks(group: list[slice]) -> list[tuple[slice, slice]]:
    """Each block of queries, and the keys up to its last query. Later ones are masked for all of them."""
    T = window_length(group)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        blocks.append((slice(start, end), slice(0, end)))
    return blocks


def causal_mask(rows: PackedRows, like: Tensor) -> Tensor:
    """(T, T): 0 for the keys that a query sees, -inf for later ones."""
    T = round_up(rows.max_seqlen, ROUND_LEN)
    return like.new_full((T, T), -torch.inf).triu(1)


def gather_heads(x: Tensor, group: list[slice], parts: int, n_head: int, zero_extra: bool = False) -> Tensor:
    """The windows of the group's rows in x (N, parts C): (parts, b nh, T, hs). The tokens beyond the end of a row are
    those that follow it in x, or zeros with `zero_extra`."""
    b, T = len(group), window_length(group)
    x = x.unflatten(1, (parts, n_head, -1))  # (N, parts, nh, hs)
    windows = x.new_empty(parts, b, n_head, T, x.shape[3])
    for i, row in enumerate(group):
        end = row.stop if zero_extra else row.start + T
        count = end - row.start
        windows[:, i, :, :count] = x[row.start : end].permute(1, 2, 0, 3)  # (parts, nh, count, hs)
        if zero_extra:
            windows[:, i, :, count:] = 0
    return windows.flatten(1, 2)


def scatter_heads(windows: Tensor, group: list[slice], out: Tensor, n_head: int) -> None:
    """Copy the tokens of the rows, without those beyond their ends, from `windows` (parts, b nh, T, hs) into `out`
    (N, parts C)."""
    windows = windows.unflatten(1, (len(group), n_head))  # (parts, b, nh, T, hs)
    out = out.unflatten(1, (len(windows), n_head, -1))  # (N, parts, nh, hs)
    for i, row in enumerate(group):
        seqlen = row.stop - row.start
        out[row] = windows[:, i, :, :seqlen].permute(2, 0, 1, 3)  # (parts, nh, seqlen, hs) -> (seqlen, parts, nh, hs)


def add_matmul(out: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float = 1.0) -> None:
    """out <- beta out + alpha a b, in place."""
    torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) for q (b nh, queries, hs), k (b nh, keys, hs) and mask (queries, keys)."""
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def offset_seed(seed: Tensor | None, group: list[slice], block: slice) -> Tensor | None:
    """A different dropout seed for each group of rows and each query block."""
    return None if seed is None else seed + group[0].start + block.start


def dropout_probs(probs: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Dropout with a mask that depends on the seed alone, so that the backward pass draws the same one."""
    if not dropout:
        return probs
    flat = probs.flatten(0, 1)  # (b nh, queries, keys) -> (b nh queries, keys): drop takes matrices
    dropped = drop([flat], dropout, seed)[0].view_as(probs)
    return dropped / (1 - dropout)
