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
