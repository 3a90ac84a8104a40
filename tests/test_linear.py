"""Linear layers in pieces, and with cast weights, against float64."""

import pytest
import torch
import torch.nn.functional as F

from minift.ops import linear as module
from minift.ops.linear import CastLinear, linear, matmul

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


@pytest.mark.parametrize("trains", ["weight bias", "weight", "bias", "bias x", "weight bias x"])
def test_trained_weights_are_cast_and_get_gradients_in_fp32(trains: str) -> None:
    """The Function for a GPU. Frozen weights have the dtype of x."""
    generator = torch.Generator().manual_seed(0)
    given, exact = {}, {}
    for name, shape in {"x": (50, 24), "weight": (40, 24), "bias": (40,)}.items():
        tensor = torch.randn(shape, generator=generator).bfloat16()
        dtype = torch.float32 if name in trains.split() and name != "x" else torch.bfloat16
        given[name] = tensor.to(dtype).requires_grad_(name in trains.split())
        exact[name] = tensor.detach().double().requires_grad_(name in trains.split())
    dy = torch.randn(50, 40, generator=generator).bfloat16()
    found, wanted = CastLinear.apply(*given.values()), F.linear(*exact.values())
    found.backward(dy)
    wanted.backward(dy.double())
    assert (found - wanted).norm() < 4e-3 * wanted.norm() and found.dtype == torch.bfloat16
    for name, tensor in given.items():
        assert (tensor.grad is not None) == (name in trains.split())
        if tensor.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            assert (tensor.grad - exact[name].grad).norm() < 4e-3 * exact[name].grad.norm()
