"""Causal attention over rows of different lengths that lie end to end, without padding between them.

Letters in shape comments: N tokens of all rows, B rows, T the longest row, C = n_embd, nh heads, hs = C / nh.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels

# Where a kernel is compiled for each shape of a product (linear.by_onednn), ragged rows had better make few:
# rows are seen through windows of a multiple of WINDOW tokens, and N is a multiple of TOKENS.
WINDOW = 32
TOKENS = 128
CHUNK = 512  # queries of a row whose probabilities exist at one time; those of shorter rows are kept
GROUP = 2**20  # probabilities that rows attended together may have: small models save calls by it


class Rows:
    """Where the tokens of B ragged rows are: in (N, ...), row after row, and in (B, T, ...), padded on the
    right. N is a multiple of WINDOW, or of TOKENS if there are to be `few_shapes`; what fills it up repeats
    the first token, and nothing may depend on it.

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
    attention. On a CPU it is WindowedAttention: the fused one takes 27 ms backward where plain products take
    4 (8 rows of 167 tokens in bf16, two cores with AMX), and every row would be padded to the longest."""
    if qkv.device.type == "cpu":
        seed = torch.randint(2**62, ()) if dropout else None
        return WindowedAttention.apply(qkv, rows, n_head, scale, dropout, seed)
    q, k, v = split_heads(rows.padded(qkv), n_head)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    return rows.flat(y.transpose(1, 2).flatten(2))


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Views of q, k and v, each (B, nh, T, hs), of (B, T, 3C)."""
    B, T, C = qkv.shape
    return qkv.view(B, T, 3, n_head, C // 3 // n_head).permute(2, 0, 3, 1, 4).unbind(0)


class WindowedAttention(torch.autograd.Function):
    """Attention by plain products, through windows: a row's tokens and, up to a round number, what follows
    them. The mask hides those from the row's own queries, what they ask in turn is thrown away, and in the
    backward pass they get and give zeros. Probabilities of up to CHUNK tokens a row are kept; of longer rows
    they are made again: memory grows with the tokens, not with the square of a row's length."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Rows, n_head: int, scale: float, dropout: float,
                seed: Tensor | None) -> Tensor:
        groups, saved = rows.groups(n_head), [seed]
        y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        y[rows.real :] = 0
        mask = causal_mask(rows, qkv)
        for group in groups:
            heads = windows(qkv.unflatten(1, (3, n_head, -1)), group)  # (3, b nh, T, hs)
            out, kept = attend(heads, mask, scale, dropout, moved(seed, group[0].start))
            put_back(out[None], group, y.unflatten(1, (1, n_head, -1)))
            saved += [heads, kept]
        ctx.save_for_backward(*saved)
        ctx.given = rows, groups, n_head, scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, groups, n_head, scale, dropout = ctx.given
        seed, *saved = ctx.saved_tensors
        dqkv = dy.new_empty(len(dy), 3 * dy.shape[1])
        dqkv[rows.real :] = 0
        mask = causal_mask(rows, dy)
        for group, heads, kept in zip(groups, saved[::2], saved[1::2], strict=True):
            dout = windows(dy.unflatten(1, (1, n_head, -1)), group, zeros=True)[0]
            dheads = attend_backward(dout, heads, kept, mask, scale, dropout, moved(seed, group[0].start))
            put_back(dheads, group, dqkv.unflatten(1, (3, n_head, -1)))
        return dqkv, None, None, None, None, None


def causal_mask(rows: Rows, like: Tensor) -> Tensor:
    """0 where a chunk's query may look and -inf where it may not."""
    T = min(window(slice(0, rows.T)), CHUNK)
    return like.new_full((T, T), -torch.inf).triu(1)


def windows(x: Tensor, group: list[slice], zeros: bool = False) -> Tensor:
    """(N, parts, nh, hs) -> (parts, b nh, T, hs), a window on each row of the group; `zeros` for what is not
    the row's own."""
    T = window(group[0])
    out = (x.new_zeros if zeros else x.new_empty)(x.shape[1], len(group), x.shape[2], T, x.shape[3])
    for i, row in enumerate(group):
        end = row.stop if zeros else row.start + T
        out[:, i, :, : end - row.start] = x[row.start : end].permute(1, 2, 0, 3)
    return out.flatten(1, 2)


def put_back(x: Tensor, group: list[slice], out: Tensor) -> None:
    """The rows' own tokens of (parts, b nh, T, hs) into `out` (N, parts, nh, hs)."""
    x = x.unflatten(1, (len(group), -1))
    for i, row in enumerate(group):
        out[row] = x[:, i, :, : row.stop - row.start].permute(2, 0, 1, 3)


def attend(heads: Tensor, mask: Tensor, scale: float, dropout: float, seed: Tensor | None
           ) -> tuple[Tensor, Tensor | None]:
    """(3, b nh, T, hs) -> (b nh, T, hs), a chunk of queries at a time, without the keys after its last query;
    and the probabilities, if there was one chunk."""
    (q, k, v), T = heads, heads.shape[2]
    y = torch.empty_like(q)
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        weights = probabilities(q, k, start, end, mask, scale)  # (b nh, end - start, end)
        add_product(y[:, start:end], dropped(weights, dropout, moved(seed, start)), v[:, :end], beta=0)
    return y, weights if T <= CHUNK else None


def attend_backward(dy: Tensor, heads: Tensor, kept: Tensor | None, mask: Tensor, scale: float,
                    dropout: float, seed: Tensor | None) -> Tensor:
    """dy (b nh, T, hs) -> (3, b nh, T, hs); `kept` are the probabilities, or None to make them again."""
    (q, k, v), T = heads, heads.shape[2]
    dheads = torch.empty_like(heads)
    dq, dk, dv = dheads
    for start in reversed(range(0, T, CHUNK)):  # the last chunk sees every key, and comes first
        end, beta = min(start + CHUNK, T), int(start + CHUNK < T)
        weights = probabilities(q, k, start, end, mask, scale) if kept is None else kept
        left = dropped(weights, dropout, moved(seed, start))
        add_product(dv[:, :end], left.transpose(1, 2), dy[:, start:end], beta)
        dweights = dropped(dy[:, start:end] @ v[:, :end].transpose(1, 2), dropout, moved(seed, start))
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        add_product(dq[:, start:end], dscores, k[:, :end], 0, scale)
        add_product(dk[:, :end], dscores.transpose(1, 2), q[:, start:end], beta, scale)
    return dheads


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float = 1.0) -> None:
    """out <- beta out + alpha a b, in place."""
    torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)


def probabilities(q: Tensor, k: Tensor, start: int, end: int, mask: Tensor, scale: float) -> Tensor:
    """What the queries start..end make of the keys 0..end."""
    hidden = mask[: end - start, : end - start]
    if start:
        hidden = F.pad(hidden, (start, 0))
    return torch.baddbmm(hidden, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale).softmax(-1)


def moved(seed: Tensor | None, place: int) -> Tensor | None:
    """A seed for what begins at another place: of a row in N, and of a chunk in its row."""
    return None if seed is None else seed + place


def dropped(weights: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """`weights` after dropout; the same elements fall out whenever the seed is the same."""
    if not dropout:
        return weights
    return kernels.dropped([weights.flatten(0, 1)], dropout, seed)[0].view_as(weights) / (1 - dropout)
