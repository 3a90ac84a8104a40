"""Attention over ragged rows against plain formulas in float64."""

import math

import pytest
import torch

from minift.ops import attention as module
from minift.ops.attention import Rows, WindowedAttention, attention

LENGTHS, HEADS, SCALE = [5, 48, 1, 33], 3, 0.3


def some_qkv(rows: Rows, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(rows.positions), 3 * HEADS * 8, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(qkv: torch.Tensor) -> torch.Tensor:
    """Row after row, head after head, query after query."""
    rows, C = [], qkv.shape[1] // 3
    for row in qkv[: sum(LENGTHS)].split(LENGTHS):
        heads = []
        for h in range(HEADS):
            q, k, v = (row[:, part * C + h * 8 : part * C + h * 8 + 8] for part in range(3))
            y = [((SCALE * k[: t + 1] @ q[t]).softmax(0)[:, None] * v[: t + 1]).sum(0) for t in range(len(q))]
            heads.append(torch.stack(y))
        rows.append(torch.cat(heads, 1))
    return torch.cat(rows)


def test_rows_go_there_and_back() -> None:
    rows = Rows(LENGTHS, torch.device("cpu"))
    assert (rows.T, rows.real, len(rows.positions)) == (48, 87, 128)  # the last window ends at 54 + 64
    assert rows.starts.tolist() == [0, 5, 53, 54]
    assert rows.positions[:7].tolist() == [0, 1, 2, 3, 4, 0, 1] and not rows.positions[87:].any()
    assert rows.numbers[[0, 4, 5, 52, 53, 54, 86]].tolist() == [0, 0, 1, 1, 2, 3, 3]
    x = torch.arange(1, 129.0)[:, None]
    padded = rows.padded(x)
    assert padded.shape == (4, 48, 1) and padded.sum() == x[:87].sum()
    for row, (start, n) in enumerate(zip(rows.starts.tolist(), LENGTHS, strict=True)):
        assert torch.equal(padded[row, :n], x[start : start + n]) and not padded[row, n:].any()
    assert torch.equal(rows.flat(padded)[:87], x[:87])


def test_rounding_follows_the_products() -> None:
    """Few shapes where each is compiled; little waste where none is, and in small steps."""
    lengths = [500, 40]  # the last window ends at 564
    assert [len(Rows(lengths, torch.device("cpu"), few).positions) for few in (False, True)] == [576, 640]
    assert len(Rows([70], torch.device("cpu"), True).positions) == 96


def test_rows_are_attended_together_by_powers_of_two() -> None:
    """Each row once, those of one window together, as long as their probabilities stay below the bound."""
    rows = Rows([40] * 7 + [33, 300, 290], torch.device("cpu"))
    groups = [[(one.start, one.stop - one.start) for one in group] for group in rows.groups(12)]
    assert [len(group) for group in groups] == [8, 1, 1]
    assert sorted(one for group in groups for one in group) == [
        (row.start, row.stop - row.start) for row in rows.slices]


@pytest.mark.parametrize("chunk", [256, 16, 7])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                          (torch.bfloat16, 1.5e-2)])
def test_attention_forward_and_backward(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype,
                                        error: float) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    rows = Rows(LENGTHS, torch.device("cpu"))
    qkv = some_qkv(rows, dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    dy = torch.randn(87, HEADS * 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = attention(qkv, rows, HEADS, SCALE, 0.0)[:87], by_hand(exact)
    found.backward(dy.to(dtype))
    wanted.backward(dy)
    assert (found - wanted).norm() < error * wanted.norm()
    assert (qkv.grad - exact.grad).norm() < error * exact.grad.norm()
    for given in (qkv.detach(), qkv):  # below what trains, and in evaluation
        with torch.set_grad_enabled(given is not qkv):
            plain = attention(given, rows, HEADS, SCALE, 0.0)
        assert (plain[:87] - wanted).norm() < error * wanted.norm() and not plain[87:].any()


@pytest.mark.parametrize("chunk", [256, 16])
def test_attention_dropout_and_its_gradient(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """The weights that fall out are the same in both passes (gradcheck), and the rest makes up for them."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    rows = Rows([20, 3], torch.device("cpu"))
    qkv, seed = some_qkv(rows).requires_grad_(), torch.tensor(7)

    def run(qkv: torch.Tensor, dropout: float = 0.3) -> torch.Tensor:
        return WindowedAttention.apply(qkv, rows, HEADS, SCALE, dropout, seed)[:23]

    assert torch.autograd.gradcheck(run, qkv)
    ones = qkv.detach().clone()
    ones[:, 2 * HEADS * 8 :] = 1  # then y is what is left of the weights
    kept = run(ones, 0.3)[:, ::8]  # (23, HEADS)
    assert kept.mean().item() == pytest.approx(1, abs=0.15) and kept.std() > 0.1
    assert set(run(ones, 0.3)[0].tolist()) <= {0.0, 1 / 0.7}, "a first token has one weight, there or not"


@pytest.mark.parametrize("T, kept", [(512, 4 * 512 * 512), (1024, 0)])
def test_what_attention_keeps_for_the_backward_pass(T: int, kept: int) -> None:
    """qkv, and the probabilities of short rows alone: memory must not grow with the square of long ones."""
    rows = Rows([T], torch.device("cpu"))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attention(torch.randn(T, 3 * 4 * 8, requires_grad=True), rows, 4, 1 / math.sqrt(8), 0.0)
    assert sum(sizes) == T * 96 + kept
