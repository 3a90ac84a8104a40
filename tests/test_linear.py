"""Linear layers in pieces against float64."""

import pytest
import torch
import torch.nn.functional as F

from minift.ops import linear as module
from minift.ops.linear import linear, matmul

# few, fewer outputs than the 24 inputs, in pieces of 2 N / 3 tokens, in halves of the outputs, whole
SHAPES = [(1, 1), (50, 9), (20, 40), (33, 40), (41, 40), (60, 41), (79, 41), (80, 40), (7, 1283), (1500, 1283)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M, N", SHAPES)
def test_forward_and_every_gradient(monkeypatch: pytest.MonkeyPatch, M: int, N: int, bias: bool) -> None:
    monkeypatch.setattr(module, "uses_onednn_bf16", lambda device, dtype: dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
             for shape in [(M, 24), (N, 24), *[(N,)] * bias]]
    given = [tensor.detach().float().requires_grad_() for tensor in exact]
    dy = torch.randn(M, N, generator=generator, dtype=torch.float64)
    wanted, found = F.linear(*exact), linear(*given, *[None] * (not bias))
    wanted.backward(dy)
    found.backward(dy.float())
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    with torch.no_grad():
        assert torch.equal(linear(*given, *[None] * (not bias)), found)
    for a, b in zip(given, exact, strict=True):
        assert (a.grad - b.grad).norm() < 1e-6 * b.grad.norm()


@pytest.mark.skipif(not module.uses_onednn_bf16(torch.device("cpu"), torch.bfloat16),
                    reason="this processor has no products in bf16")
@pytest.mark.parametrize("M, N", SHAPES)
def test_in_bf16(M: int, N: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16()
                       for shape in [(M, 24), (N, 24), (N,)])
    wanted = F.linear(x.double(), weight.double(), bias.double())
    for matrix in (weight.T, weight.T.contiguous()):  # the second as GPT-2's files have it
        assert (matmul(x, matrix, bias) - wanted).norm() < 4e-3 * wanted.norm()


def test_an_input_is_kept_only_for_a_matrix_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "uses_onednn_bf16", lambda device, dtype: True)
    x, kept = torch.randn(30, 24, requires_grad=True), []
    for trains in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
            linear(x, torch.randn(40, 24, requires_grad=trains), None)
        assert (x.shape in kept) == trains
