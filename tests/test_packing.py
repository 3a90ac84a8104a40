"""minift/model/packing.py: where tokens and targets of rows lie in a batch, and the loss over several spans."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from minift.model.packing import Batch, Row, pack, text_row

ROWS = [
    Row([11, 12, 13, 14, 15, 16, 17], ((1, 3), (5, 7))),  # a dialogue: two spans are learned
    Row([21, 22, 23], ((2, 3),)),
    Row([31, 32, 33, 34], ()),
]


def pack_rows(rows: list[Row], prompt_tokens: int = 0, round_shapes: bool = False) -> Batch:
    return pack(rows, prompt_tokens, torch.device("cpu"), round_shapes)


def test_where_tokens_and_targets_lie() -> None:
    batch = pack_rows(ROWS)
    rows = batch.rows
    assert rows.seqlens == [6, 2, 3] and rows.max_seqlen == 6 and rows.num_tokens == 11
    assert rows.cu_seqlens.tolist() == [0, 6, 8, 11, 64] and rows.cu_seqlens.dtype == torch.int32
    assert batch.tokens[:11].tolist() == [11, 12, 13, 14, 15, 16, 21, 22, 31, 32, 33]
    assert rows.row_ids[:11].tolist() == [0] * 6 + [1] * 2 + [2] * 3
    assert rows.positions[:11].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2]
    assert batch.target_positions.tolist() == [0, 1, 4, 5, 7]  # the token before each target
    assert batch.targets.tolist() == [12, 13, 16, 17, 23]
    assert batch.padded_positions.tolist() == [0, 1, 4, 5, 7] + [0] * 59
    assert [row.num_targets for row in ROWS] == [4, 1, 0]
    assert [row.tolist() for row in map(batch.tokens.__getitem__, rows.slices)] == [row.ids[:-1] for row in ROWS]


def test_filler_repeats_the_first_token() -> None:
    batch = pack_rows(ROWS)
    assert len(batch.tokens) == len(batch.rows.row_ids) == len(batch.rows.positions) == 64  # 8 + one window of 32
    for values in (batch.tokens, batch.rows.row_ids, batch.rows.positions):
        assert (values[11:] == values[0]).all()
    assert len(pack_rows([text_row([1] * 600)], round_shapes=True).tokens) == 640
    assert len(pack_rows([text_row([1] * 600)], round_shapes=False).tokens) == 608


def test_reserved_positions_in_front_of_each_row() -> None:
    """Every row's tokens and targets move by them; no target is among them."""
    batch, without = pack_rows(ROWS, prompt_tokens=3), pack_rows(ROWS)
    assert batch.rows.seqlens == [9, 5, 6] and batch.rows.cu_seqlens.tolist() == [0, 9, 14, 20, 64]
    assert batch.rows.positions[9:14].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(batch.targets, without.targets)
    assert batch.target_positions.tolist() == [3, 4, 7, 8, 13]
    assert (batch.rows.positions[batch.target_positions] >= 3).all()
    before = torch.tensor([11, 12, 15, 16, 22])
    assert torch.equal(batch.tokens[batch.target_positions], before)
    assert torch.equal(without.tokens[without.target_positions], before)


def test_a_batch_without_targets() -> None:
    batch = pack_rows([replace(row, spans=()) for row in ROWS])
    for values in (batch.target_positions, batch.targets):
        assert values.shape == (0,) and values.dtype == torch.long
    assert torch.equal(batch.tokens, pack_rows(ROWS).tokens)


@pytest.mark.parametrize("soft", [0, 4])
def test_the_loss_of_several_spans_is_the_sum_over_them(make_gpt: Callable, soft: int) -> None:
    model = make_gpt()
    if soft:
        model.prompt, model.prompt_tokens = nn.Embedding(soft, model.config.n_embd), soft
    row = ROWS[0]
    together = model.loss(model.pack([row])).item()
    one_by_one = [model.loss(model.pack([replace(row, spans=(span,))])).item() for span in row.spans]
    by_hand = 0.0
    with torch.no_grad():
        everything = model.pack([Row([*row.ids, 0], ())])
        log_probs = model.logits(model.hidden(everything)).log_softmax(-1)
        for begin, end in row.spans:
            for i in range(begin, end):
                by_hand -= log_probs[soft + i - 1, row.ids[i]].item()
    assert together == pytest.approx(by_hand, rel=1e-5) and together == pytest.approx(sum(one_by_one), rel=1e-5)


def test_text_rows_learn_every_token_but_the_first() -> None:
    assert text_row([5, 6, 7]).spans == ((1, 3),) and text_row([5, 6, 7]).num_targets == 2
