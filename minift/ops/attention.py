"""Causal attention over rows of different lengths that lie end to end, without padding between them.

Letters in shape comments: N tokens of all rows, B rows, T the longest row, C = n_embd, nh heads, hs = C / nh.
"""

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.ops.dropout import dropout as seeded_dropout

# Where a kernel is compiled for each shape of a product (uses_onednn_bf16), ragged rows had better make few:
# rows are seen through windows of a multiple of WINDOW tokens, and N is a multiple of TOKENS.
WINDOW = 32
TOKENS = 128
CHUNK = 512  # queries of a row whose probabilities exist at one time; those of shorter rows are kept
GROUP = 2**20  # probabilities that rows attended together may have: small models save calls by it


class Rows:
    """Where the tokens of B ragged rows are: in (N, ...), row after row, and in (B, T, ...), padded on the
    right. N is a multiple of WINDOW, or of TOKENS beyond 4 TOKENS if there are to be `few_shapes`; what fills
    it up repeats the first token, and nothing may depend on it.

    `numbers` (N,) are the tokens' rows, `positions` (N,) their places in them, `starts` (B,) the rows' places
    in N.
    """

    def __init__(self, lengths: list[int], device: torch.device, few_shapes: bool = False):
        self.B, self.T, self.real = len(lengths), max(lengths), sum(lengths)
        self.slices = [slice(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)]
        N = max(row.start + window(row) for row in self.slices)
        fill = (0, N + -N % (TOKENS if few_shapes and N > 4 * TOKENS else WINDOW) - self.real)
        self.starts = torch.tensor([row.start for row in self.slices], device=device)
        self.positions = F.pad(torch.cat([torch.arange(n) for n in lengths]), fill).to(device)
        numbers = torch.cat([torch.full((n,), row) for row, n in enumerate(lengths)])
        self.numbers = F.pad(numbers, fill).to(device)
        self.places = self.numbers * self.T + self.positions  # (N,), in (B T)

    def flat(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def padded(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), with zeros where there is no token."""
        empty = x.new_zeros(self.B * self.T, *x.shape[1:])
        return empty.index_copy(0, self.places[: self.real], x[: self.real]).unflatten(0, (self.B, self.T))

    def groups(self, n_head: int) -> list[list[slice]]:
        """The rows, those with windows of one length together, as far as GROUP allows: by powers of two, for
        few shapes."""
        alike: dict[int, list[slice]] = {}
        for row in self.slices:
            alike.setdefault(window(row), []).append(row)
        groups = []
        for T, rows in alike.items():
            most = max(1, GROUP // (n_head * T * min(T, CHUNK)))
            while rows:
                count = 1 << min(most, len(rows)).bit_length() - 1
                groups.append(rows[:count])
                rows = rows[count:]
        return groups


def window(row: slice) -> int:
    """How many tokens a row is seen through."""
    n = row.stop - row.start
    return n + -n % WINDOW


def attention(qkv: Tensor, rows: Rows, n_head: int, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v in each row: (N, 3C) -> (N, C). On a GPU this is torch's fused
    attention. On a CPU, where every row would be padded to the longest, it is that row by row; and where
    gradients are asked for, it is WindowedAttention: the fused one takes 27 ms backward where plain products
    take 4 (8 rows of 167 tokens in bf16, two cores with AMX)."""
    if qkv.device.type == "cpu":
        if dropout or (qkv.requires_grad and torch.is_grad_enabled()):
            seed = torch.randint(2**62, ()) if dropout else None
            return WindowedAttention.apply(qkv, rows, n_head, scale, dropout, seed)
        heads = qkv.unflatten(1, (3, n_head, -1)).permute(1, 2, 0, 3)  # (3, nh, N, hs)
        y = qkv.new_zeros(len(qkv), *heads.shape[1::2])  # (N, nh, hs)
        for row in rows.slices:
            out = F.scaled_dot_product_attention(*heads[:, None, :, row], is_causal=True, scale=scale)
            y[row] = out[0].transpose(0, 1)
        return y.flatten(1)
    q, k, v = rows.padded(qkv).unflatten(2, (3, n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    return rows.flat(y.transpose(1, 2).flatten(2))


class WindowedAttention(torch.autograd.Function):
    """Attention by plain products, through windows: a row's tokens and, up to a round number, what follows
    them. The mask hides those from the row's own queries, what they ask in turn is thrown away, and in the
    backward pass they get and give zeros. Probabilities of up to CHUNK tokens a row are kept; of longer rows
    they are made again: memory grows with the tokens, not with the square of a row's length. Windows
    and scores are written to memory that the next rows use again, while it is in the caches."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Rows, n_head: int, scale: float, dropout: float,
                seed: Tensor | None) -> Tensor:
        groups, mask = rows.groups(n_head), causal_mask(rows, qkv)
        y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        y[rows.real :] = 0
        memory, scores = reusable(4, groups, n_head, y)
        kept = []
        for group in groups:
            heads = windows(memory, group, y.shape[1], n_head)  # (4, b, nh, T, hs)
            read(qkv.unflatten(1, (3, n_head, -1)), group, heads[:3])
            kept.append(attend(*heads.flatten(1, 2), scores, mask, scale, dropout,
                               moved(seed, group[0].start)))
            write(heads[3:], group, y.unflatten(1, (1, n_head, -1)))
        ctx.save_for_backward(seed, qkv, *kept)
        ctx.given = rows, groups, n_head, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, groups, n_head, scale, dropout = ctx.given
        seed, qkv, *kept = ctx.saved_tensors
        dqkv, mask = torch.empty_like(qkv), causal_mask(rows, qkv)
        dqkv[rows.real :] = 0
        memory, scores = reusable(7, groups, n_head, dy)
        for group, weights in zip(groups, kept, strict=True):
            heads = windows(memory, group, dy.shape[1], n_head)  # (7, b, nh, T, hs)
            read(qkv.unflatten(1, (3, n_head, -1)), group, heads[:3])
            read(dy.unflatten(1, (1, n_head, -1)), group, heads[3:4], zeros=True)
            attend_backward(*heads.flatten(1, 2), weights, scores, mask, scale, dropout,
                            moved(seed, group[0].start))
            write(heads[4:], group, dqkv.unflatten(1, (3, n_head, -1)))
        return dqkv, None, None, None, None, None


def causal_mask(rows: Rows, like: Tensor) -> Tensor:
    """0 where a chunk's query may look and -inf where it may not."""
    T = min(window(slice(0, rows.T)), CHUNK)
    return like.new_full((T, T), -torch.inf).triu(1)


def reusable(parts: int, groups: list[list[slice]], n_head: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for windows of so many parts, each as wide as `like` (N, C), and for scores, of any one group."""
    sizes = [(len(group), window(group[0])) for group in groups]
    memory = like.new_empty(parts, max(b * T for b, T in sizes) * like.shape[1])
    return memory, like.new_empty(max(b * n_head * min(T, CHUNK) * T for b, T in sizes))


def windows(memory: Tensor, group: list[slice], C: int, n_head: int) -> Tensor:
    """A group's part of the memory, as (parts, b, nh, T, hs): a window for each row."""
    tokens = len(group) * window(group[0])
    return memory[:, : tokens * C].view(len(memory), len(group), n_head, -1, C // n_head)


def read(x: Tensor, group: list[slice], out: Tensor, zeros: bool = False) -> None:
    """What windows show of x (N, parts, nh, hs) into `out` (parts, b, nh, T, hs), with `zeros` for what is
    not the row's own."""
    for i, row in enumerate(group):
        end = row.stop if zeros else row.start + out.shape[3]
        out[:, i, :, : end - row.start] = x[row.start : end].permute(1, 2, 0, 3)
        if zeros:
            out[:, i, :, end - row.start :] = 0


def write(x: Tensor, group: list[slice], out: Tensor) -> None:
    """The rows' own tokens of x (parts, b, nh, T, hs) into `out` (N, parts, nh, hs)."""
    for i, row in enumerate(group):
        out[row] = x[:, i, :, : row.stop - row.start].permute(2, 0, 1, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, memory: Tensor, mask: Tensor, scale: float,
           dropout: float, seed: Tensor | None) -> Tensor | None:
    """q, k, v -> out, each (b nh, T, hs), a chunk of queries at a time, without the keys after its last
    query; gives the probabilities if there was one chunk."""
    T = q.shape[1]
    keep = T <= CHUNK
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        weights = probabilities(q, k, start, end, memory, mask, scale, keep)  # (b nh, end - start, end)
        torch.bmm(dropped(weights, dropout, moved(seed, start)), v[:, :end], out=out[:, start:end])
    return weights if keep else None


def attend_backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
                    kept: Tensor | None, memory: Tensor, mask: Tensor, scale: float, dropout: float,
                    seed: Tensor | None) -> None:
    """q, k, v, dy -> dq, dk, dv, each (b nh, T, hs); `kept` are the probabilities, or None to make them
    again."""
    T = q.shape[1]
    for start in reversed(range(0, T, CHUNK)):  # the last chunk sees every key, and comes first
        end, beta = min(start + CHUNK, T), int(start + CHUNK < T)
        weights = kept
        if kept is None:
            weights = probabilities(q, k, start, end, memory, mask, scale, keep=True)
        left = dropped(weights, dropout, moved(seed, start))
        add_product(dv[:, :end], left.transpose(1, 2), dy[:, start:end], beta)
        dscores = memory[: weights.numel()].view_as(weights)
        torch.bmm(dy[:, start:end], v[:, :end].transpose(1, 2), out=dscores)
        dscores = dropped(dscores, dropout, moved(seed, start))
        torch._softmax_backward_data(dscores, weights, -1, weights.dtype, grad_input=dscores)
        add_product(dq[:, start:end], dscores, k[:, :end], 0, scale)
        add_product(dk[:, :end], dscores.transpose(1, 2), q[:, start:end], beta, scale)


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float = 1.0) -> None:
    """out <- beta out + alpha a b, in place."""
    torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)


def probabilities(q: Tensor, k: Tensor, start: int, end: int, memory: Tensor, mask: Tensor, scale: float,
                  keep: bool = False) -> Tensor:
    """What the queries start..end make of the keys 0..end: a new tensor if it is to be kept, else in the
    memory."""
    hidden = mask[: end - start, : end - start]
    if start:
        hidden = F.pad(hidden, (start, 0))
    shape = len(q), end - start, end
    scores = memory[: math.prod(shape)].view(shape)
    torch.baddbmm(hidden, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale, out=scores)
    return scores.softmax(-1) if keep else torch.softmax(scores, -1, out=scores)


def moved(seed: Tensor | None, place: int) -> Tensor | None:
    """A seed for what begins at another place: of a row in N, and of a chunk in its row."""
    return None if seed is None else seed + place


def dropped(weights: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """`weights` after dropout; the same elements fall out whenever the seed is the same."""
    if not dropout:
        return weights
    return seeded_dropout(weights.flatten(0, 1), dropout, seed).view_as(weights)
