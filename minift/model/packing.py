"""Rows of different lengths as one batch: all tokens one after another, without padding between the rows.

This is the only form of a batch. Training, validation, scores and the first pass of decoding use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops.attention import PackedRows, padded_length


@dataclass(frozen=True)
class Row:
    """Token ids, and the spans of them that are targets, as (begin, end) with `end` excluded. A chat may have several
    spans. A span begins at 1 or later: the first token cannot be predicted from a token before it."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def num_targets(self) -> int:
        return sum(end - begin for begin, end in self.spans)


def text_row(ids: list[int]) -> Row:
    """A row in which every token after the first is a target."""
    return Row(ids, ((1, len(ids)),))


@dataclass(frozen=True)
class Batch:
    """Packed rows with their tokens and targets."""

    tokens: Tensor  # (N,): token ids; those of reserved positions and of the filler at the end have no meaning
    rows: PackedRows  # the layout of the rows in the N tokens
    target_positions: Tensor  # (n,): indices into N of the tokens whose next token is a target
    targets: Tensor  # (n,): those next tokens


def pack_tokens(sequences: Sequence[list[int]], prompt_tokens: int, device: torch.device,
                round_shapes: bool) -> tuple[Tensor, PackedRows]:
    """Tokens (N,) and the layout of sequences, each with `prompt_tokens` reserved positions in front. N is rounded up,
    see `padded_length`."""
    seqlens = [prompt_tokens + len(ids) for ids in sequences]
    filler = padded_length(seqlens, round_shapes) - sum(seqlens)
    tokens, row_ids, positions, cu_seqlens = [], [], [], [0]
    for row, ids in enumerate(sequences):
        tokens += [0] * prompt_tokens + ids
        row_ids += [row] * seqlens[row]
        positions += range(seqlens[row])
        cu_seqlens.append(len(tokens))
    cu_seqlens.append(len(tokens) + filler)

    def tensor(values: list[int]) -> Tensor:
        # the filler repeats the values of the first token: valid ids and positions, and nothing reads their results
        return torch.tensor(values + values[:1] * filler, device=device)  # (N,)

    rows = PackedRows(seqlens, torch.tensor(cu_seqlens, dtype=torch.int32, device=device),
                      tensor(row_ids), tensor(positions))
    return tensor(tokens), rows


def pack(rows: Sequence[Row], prompt_tokens: int, device: torch.device, round_shapes: bool) -> Batch:
    """Rows as a batch. `prompt_tokens` is the number of reserved positions in front of each row."""
    # the model does not read the last token of a row: no token after it is to be predicted
    tokens, packed = pack_tokens([row.ids[:-1] for row in rows], prompt_tokens, device, round_shapes)
    target_positions, targets = [], []
    start = 0  # of the row in the N tokens
    for row, seqlen in zip(rows, packed.seqlens, strict=True):
        for begin, end in row.spans:
            before = start + prompt_tokens + begin - 1  # the token before the span predicts its first token
            target_positions += range(before, before + end - begin)
            targets += row.ids[begin:end]
        start += seqlen
    # with a dtype, since a list without targets would give a float tensor
    index = {"dtype": torch.long, "device": device}
    return Batch(tokens, packed, torch.tensor(target_positions, **index), torch.tensor(targets, **index))
