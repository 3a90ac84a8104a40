"""Token ids (B, T) of rows of one length, for tests that compare with code that takes such a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minift.model.gpt import GPT
from minift.model.packing import Batch, Row, pack
from minift.ops.attention import PackedRows


def random_ids(vocab_size: int, rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def learned_from(ids: Tensor, begins: Sequence[int]) -> list[Row]:
    """Rows in which everything from token `begins[i]` of row i on is learned."""
    return [Row(row, ((begin, len(row)),)) for row, begin in zip(ids.tolist(), begins, strict=True)]


def without_targets(model: GPT, ids: Tensor) -> Batch:
    """A batch in which the model reads every token of ids (B, T): pack leaves out a row's last one."""
    return model.pack([Row([*row, 0], ()) for row in ids.tolist()])


def hidden(model: GPT, ids: Tensor) -> Tensor:
    """Final hidden states (B, T, C) of ids (B, T), without those of reserved positions."""
    batch = without_targets(model, ids)
    states = model.hidden(batch)  # (N, C)
    return torch.stack([states[row][model.prompt_tokens :] for row in batch.rows.slices])


def logits(model: GPT, ids: Tensor) -> Tensor:
    """(B, T) -> (B, T, V)"""
    return model.logits(hidden(model, ids))


def packed_rows(seqlens: Sequence[int], round_shapes: bool = False, device: str = "cpu") -> PackedRows:
    """The layout of rows of these lengths."""
    return pack([Row([1] * (seqlen + 1), ()) for seqlen in seqlens], 0, torch.device(device), round_shapes).rows


def flash_stand_in(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
                   causal: bool, debug_mask: bool, *, scale: float) -> tuple[Tensor, ...]:
    """Takes the arguments of torch's flash attention, checks what its kernels check, and computes with plain products,
    without dropout. Tokens that are in no row stay NaN, as memory that nothing wrote may be."""
    for x in (q, k, v):
        assert x.shape == q.shape and x.stride(-1) == 1 and x.dtype == q.dtype and x.device == q.device
    assert cu_q is cu_k and cu_q.dtype == torch.int32 and cu_q.device == q.device and cu_q.is_contiguous()
    assert type(max_q) is int and max_q == max_k and 0 <= dropout < 1 and causal and not debug_mask
    starts = cu_q.tolist()
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    for start, end in zip(starts, starts[1:], strict=False):
        assert 0 <= end - start <= max_q
        heads_q, heads_k, heads_v = (x[start:end].transpose(0, 1) for x in (q, k, v))  # each (nh, T, hs)
        scores = scale * heads_q @ heads_k.transpose(1, 2)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ heads_v
        out = out.index_put((torch.arange(start, end),), y.transpose(0, 1))
    return out, torch.empty(q.shape[1], len(q)), torch.empty(2), torch.empty(()), torch.empty(0)
