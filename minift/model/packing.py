"""Rows of different lengths as one batch: all tokens end to end, without padding between rows.

This is the only form of a batch. The model takes it in training, validation and the prefill of decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops.attention import PackedRows, padded_length


@dataclass(frozen=True)
class Row:
    """Token ids, and the half-open spans of them that are learned. A span begins at 1 or later: the first
    token has no token before it to be predicted from."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def num_targets(self) -> int:
        return sum(end - begin for begin, end in self.spans)


def text_row(ids: list[int]) -> Row:
    """A row in which every token after the first is learned."""
    return Row(ids, ((1, len(ids)),))


@dataclass(frozen=True)
class Batch:
    """Packed rows with their tokens and targets.

    tokens (N,): token ids; the positions of a soft prompt, and the filler at the end, hold any id.
    rows: where each row lies in the N tokens.
    target_positions (n,): indices into N of the tokens whose next token is learned.
    targets (n,): those next tokens.
    """

    tokens: Tensor
    rows: PackedRows
    target_positions: Tensor
    targets: Tensor


def pack_tokens(sequences: Sequence[list[int]], prompt_tokens: int, device: torch.device,
                round_shapes: bool) -> tuple[Tensor, PackedRows]:
    """Tokens (N,) and the layout of sequences, each with `prompt_tokens` reserved positions in front.

    N is rounded up, see `padded_length`. The filler repeats the first token; nothing reads its result.
    """
    seqlens = [prompt_tokens + len(ids) for ids in sequences]
    # attention rounds row lengths up, so the last row needs some tokens behind it
    filler = padded_length(seqlens, round_shapes) - sum(seqlens)
    tokens, row_ids, positions, cu_seqlens = [], [], [], [0]
    for row, ids in enumerate(sequences):
        tokens += [0] * prompt_tokens + ids
        row_ids += [row] * seqlens[row]
        positions += range(seqlens[row])
        cu_seqlens.append(len(tokens))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values + values[:1] * filler, device=device)  # (N,)

    rows = PackedRows(seqlens, torch.tensor(cu_seqlens, dtype=torch.int32, device=device),
                      tensor(row_ids), tensor(positions))
    return tensor(tokens), rows


def pack(rows: Sequence[Row], prompt_tokens: int, device: torch.device, round_shapes: bool) -> Batch:
    """Rows as a batch for training or scoring. A row's last token is a target only: nothing follows it."""
    tokens, packed = pack_tokens([row.ids[:-1] for row in rows], prompt_tokens, device, round_shapes)
    target_positions, targets = [], []
    start = 0  # of the row in the N tokens
    for row, seqlen in zip(rows, packed.seqlens, strict=True):
        for begin, end in row.spans:
            before = start + prompt_tokens + begin - 1  # the token before the span predicts its first token
            target_positions += range(before, before + end - begin)
            targets += row.ids[begin:end]
        start += seqlen
    index = {"dtype": torch.long, "device": device}
    return Batch(tokens, packed, torch.tensor(target_positions, **index), torch.tensor(targets, **index))
