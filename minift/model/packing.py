"""Rows of different lengths as one batch: all tokens one after another, without padding between the rows.

This is the only form of a batch. Training, validation, scores and the first pass of decoding use it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops.attention import PackedRows, padded_length

ROUND_TARGETS = 64  # each step has another n; with n rounded up, there are few shapes for oneDNN to compile


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
    padded_positions: Tensor  # target_positions, then 0 up to a multiple of ROUND_TARGETS


def pack(rows: Sequence[Row], prompt_tokens: int, device: torch.device, round_shapes: bool) -> Batch:
    """Rows as a batch. `prompt_tokens` is the number of reserved positions in front of each row. N is rounded up, see
    `padded_length`."""
    # the model does not read the last token of a row: no token after it is to be predicted
    seqlens = [prompt_tokens + len(row.ids) - 1 for row in rows]
    filler = padded_length(seqlens, round_shapes) - sum(seqlens)
    tokens, row_ids, positions, cu_seqlens, target_positions, targets = [], [], [], [0], [], []
    for number, row in enumerate(rows):
        for begin, end in row.spans:
            # the token before the span predicts its first token
            before = len(tokens) + prompt_tokens + begin - 1
            target_positions += range(before, before + end - begin)
            targets += row.ids[begin:end]
        tokens += [0] * prompt_tokens + row.ids[:-1]
        row_ids += [number] * seqlens[number]
        positions += range(seqlens[number])
        cu_seqlens.append(len(tokens))
    for values in (tokens, row_ids, positions):
        # the filler repeats the values of the first token: valid ids and positions, and nothing reads their results
        values += values[:1] * filler
    cu_seqlens.append(len(tokens))
    padding = [0] * (-len(targets) % ROUND_TARGETS)

    parts = copy_to([tokens, row_ids, positions, cu_seqlens, target_positions + padding, targets], device)
    tokens, row_ids, positions, cu_seqlens, padded_positions, targets = parts
    packed = PackedRows(seqlens, cu_seqlens.int(), row_ids, positions)
    return Batch(tokens, packed, padded_positions[: len(targets)], targets, padded_positions)


def copy_to(lists: list[list[int]], device: torch.device) -> Sequence[Tensor]:
    """Lists as int64 tensors on a device, in one copy for which a GPU is not waited for."""
    host = torch.tensor(list(itertools.chain(*lists)), dtype=torch.long)
    is_async = device.type == "cuda"
    if is_async:  # from pinned memory the copy runs while Python goes ahead
        host = torch.empty(host.shape, dtype=torch.long, pin_memory=True).copy_(host)
    return host.to(device, non_blocking=is_async).split([len(part) for part in lists])
