"""Attention over packed rows against plain formulas in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from packed import packed_rows
from torch import Tensor

from minift import ops
from minift.ops import attention as module
from minift.ops.attention import (
    PackedRows,
    WindowedAttention,
    attention,
    attention_reference,
    group_rows,
    padded_attention,
)

SEQLENS, REAL, HEADS, SCALE = [5, 48, 1, 33], 87, 3, 0.3
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
EVERY_DTYPE = pytest.mark.parametrize("dtype, error", ERRORS.items(), ids=str)
Function = Callable[[Tensor, PackedRows, int, float, float], Tensor]


def random_qkv(rows: PackedRows, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(rows.positions), 3 * HEADS * 8, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(qkv: Tensor) -> Tensor:
    """Row after row, head after head, query after query."""
    rows, C = [], qkv.shape[1] // 3
    for row in qkv[:REAL].split(SEQLENS):
        heads = []
        for h in range(HEADS):
            q, k, v = (row[:, part * C + h * 8 : part * C + h * 8 + 8] for part in range(3))
            y = [((SCALE * k[: t + 1] @ q[t]).softmax(0)[:, None] * v[: t + 1]).sum(0) for t in range(len(q))]
            heads.append(torch.stack(y))
        rows.append(torch.cat(heads, 1))
    return torch.cat(rows)


def check(found_by: Function, wanted_by: Callable[[Tensor], Tensor], dtype: torch.dtype, error: float) -> None:
    """Outputs and gradients of one version in `dtype` against another's in float64."""
    rows = packed_rows(SEQLENS)
    qkv = random_qkv(rows, dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    dy = torch.randn(REAL, HEADS * 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = found_by(qkv, rows, HEADS, SCALE, 0.0)[:REAL], wanted_by(exact)
    assert found.dtype == dtype
    found.backward(dy.to(dtype))
    wanted.backward(dy)
    assert (found - wanted).norm() < error * wanted.norm()
    assert (qkv.grad - exact.grad).norm() < error * exact.grad.norm()
    assert not qkv.grad[REAL:].any()


def test_rounding_follows_the_products() -> None:
    """Few shapes where each is compiled; little waste where none is, and in small steps."""
    seqlens = [500, 40]  # the last window ends at 564
    assert [len(packed_rows(seqlens, few).positions) for few in (False, True)] == [576, 640]
    assert len(packed_rows([70], True).positions) == 96


def test_rows_are_attended_together_by_powers_of_two() -> None:
    """Each row once, those of one window together, as long as their probabilities stay below the bound."""
    rows = packed_rows([40] * 7 + [33, 300, 290])
    groups = group_rows(rows, 12)
    assert [len(group) for group in groups] == [8, 1, 1]
    members = [(row.start, row.stop) for group in groups for row in group]
    assert sorted(members) == [(row.start, row.stop) for row in rows.slices]


@EVERY_DTYPE
def test_the_reference_is_the_formula(dtype: torch.dtype, error: float) -> None:
    check(attention_reference, by_hand, dtype, error)


def reference(qkv: Tensor) -> Tensor:
    return attention_reference(qkv, packed_rows(SEQLENS), HEADS, SCALE, 0.0)[:REAL]


@pytest.mark.parametrize("block", [512, 16, 7])
@EVERY_DTYPE
def test_attention_equals_its_reference(monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype,
                                        error: float) -> None:
    """Forward and backward, and without gradients."""
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    check(attention, reference, dtype, error)
    rows = packed_rows(SEQLENS)
    qkv = random_qkv(rows, dtype)
    wanted = reference(qkv.double())
    for given in (qkv, qkv.clone().requires_grad_()):  # below the first layer that trains, and in evaluation
        with torch.set_grad_enabled(not given.requires_grad):
            found = attention(given, rows, HEADS, SCALE, 0.0)
        assert (found[:REAL] - wanted).norm() < error * wanted.norm() and not found[REAL:].any()


@EVERY_DTYPE
def test_the_gpus_padded_attention_equals_the_reference(dtype: torch.dtype, error: float) -> None:
    check(padded_attention, reference, dtype, error)


def test_plain_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = packed_rows(SEQLENS)
    monkeypatch.setattr(ops, "plain", True)
    monkeypatch.setattr(module, "attention_reference", lambda *arguments: arguments)
    assert attention(random_qkv(rows), rows, HEADS, SCALE, 0.0)[1] is rows


@pytest.mark.parametrize("block", [512, 16])
def test_attention_dropout_and_its_gradient(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The weights that fall out are the same in both passes (gradcheck), and the rest makes up for them."""
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    rows = packed_rows([20, 3])
    qkv, seed = random_qkv(rows).requires_grad_(), torch.tensor(7)

    def run(qkv: Tensor, dropout: float = 0.3) -> Tensor:
        return WindowedAttention.apply(qkv, rows, HEADS, SCALE, dropout, seed)[:23]

    assert torch.autograd.gradcheck(run, qkv, fast_mode=True)
    ones = qkv.detach().clone()
    ones[:, 2 * HEADS * 8 :] = 1  # then y is what is left of the weights
    kept = run(ones, 0.3)[:, ::8]  # (23, HEADS)
    assert kept.mean().item() == pytest.approx(1, abs=0.15) and kept.std() > 0.1
    assert set(run(ones, 0.3)[0].tolist()) <= {0.0, 1 / 0.7}, "a first token has one weight, there or not"


@pytest.mark.parametrize("version", [attention_reference, padded_attention])
def test_dropout_of_the_other_versions(version: Function) -> None:
    rows = packed_rows([20, 3])
    qkv = random_qkv(rows)
    qkv[:, 2 * HEADS * 8 :] = 1
    torch.manual_seed(0)
    kept = torch.cat([version(qkv, rows, HEADS, SCALE, 0.3)[:23, ::8] for _ in range(20)])
    assert kept.mean().item() == pytest.approx(1, abs=0.05) and kept.std() > 0.1


@pytest.mark.parametrize("T, kept", [(512, 4 * 512 * 512), (1024, 0)])
def test_what_attention_keeps_for_the_backward_pass(T: int, kept: int) -> None:
    """qkv, and the probabilities of short rows alone: memory must not grow with the square of long ones."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attention(torch.randn(T, 3 * 4 * 8, requires_grad=True), packed_rows([T]), 4, 1 / math.sqrt(8), 0.0)
    assert sum(sizes) == T * 96 + kept
