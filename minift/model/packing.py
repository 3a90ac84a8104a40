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
    has_padding: bool = False  # whether some targets are cross_entropy.PADDING, in a CUDA graph alone


class HostBatch:
    """The numbers of a batch as lists on the host, with the names of Batch and of PackedRows."""

    def __init__(self, rows: Sequence[Row], prompt_tokens: int):
        # the model does not read the last token of a row: no token after it is to be predicted
        self.seqlens = [prompt_tokens + len(row.ids) - 1 for row in rows]
        self.tokens: list[int] = []
        self.row_ids: list[int] = []
        self.positions: list[int] = []
        self.cu_seqlens = [0]
        self.target_positions: list[int] = []
        self.targets: list[int] = []
        for number, (row, seqlen) in enumerate(zip(rows, self.seqlens, strict=True)):
            for begin, end in row.spans:
                # the token before the span predicts its first token
                before = len(self.tokens) + prompt_tokens + begin - 1
                self.target_positions += range(before, before + end - begin)
                self.targets += row.ids[begin:end]
            self.tokens += [0] * prompt_tokens + row.ids[:-1]
            self.row_ids += [number] * seqlen
            self.positions += range(seqlen)
            self.cu_seqlens.append(len(self.tokens))

    def fill(self, N: int) -> None:
        """Add the filler: N tokens then."""
        count = N - len(self.tokens)
        for values in (self.tokens, self.row_ids, self.positions):
            # the values of the first token: valid ids and positions, and nothing reads their results
            values += values[:1] * count
        self.cu_seqlens.append(N)


def pack(rows: Sequence[Row], prompt_tokens: int, device: torch.device, round_shapes: bool) -> Batch:
    """Rows as a batch. `prompt_tokens` is the number of reserved positions in front of each row. N is rounded up, see
    `padded_length`."""
    host = HostBatch(rows, prompt_tokens)
    N, num_tokens = padded_length(host.seqlens, round_shapes), len(host.tokens)
    host.fill(N)
    padded_positions = host.target_positions + [0] * (-len(host.targets) % ROUND_TARGETS)
    lists = [host.tokens, host.row_ids, host.positions, host.cu_seqlens, padded_positions, host.targets]
    values = pinned(lists, device)
    # from pinned memory the copy runs while Python goes ahead
    parts = values.to(device, non_blocking=device.type == "cuda").split([len(part) for part in lists])
    tokens, row_ids, positions, cu_seqlens, padded_positions, targets = parts
    max_cu_seqlen = max(*host.seqlens, N - num_tokens)
    packed = PackedRows(host.seqlens, cu_seqlens.int(), max_cu_seqlen, row_ids, positions)
    return Batch(tokens, packed, padded_positions[: len(targets)], targets, padded_positions)


def pinned(lists: list[list[int]], device: torch.device) -> Tensor:
    """Lists end to end as int64 on the host, for a GPU in memory that the system does not move."""
    values = torch.tensor(list(itertools.chain(*lists)), dtype=torch.long)
    if device.type == "cuda":
        values = torch.empty(values.shape, dtype=torch.long, pin_memory=True).copy_(values)
    return values
