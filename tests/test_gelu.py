"""The hand-written GELU against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from minift.ops import gelu as module
from minift.ops.gelu import FastGELU, gelu_tanh


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_gelu_and_its_derivative(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: float) -> None:
    """From where it is 0 to where it is x, in blocks of which the last is shorter; bf16 rounds to 2^-9."""
    monkeypatch.setattr(module, "BLOCK", 1000)
    x = torch.cat([torch.linspace(-12, 12, 2401), torch.tensor([0.0, -60.0, 60.0, 3e4, -3e4, 1e-30])])
    x = x.to(dtype)[:, None].requires_grad_()
    exact = x.detach().double().requires_grad_()
    wanted, found = F.gelu(exact, approximate="tanh"), FastGELU.apply(x)
    dy = torch.linspace(-2, 2, len(x))[:, None]
    wanted.backward(dy.to(dtype).double())
    found.backward(dy.to(dtype))
    assert found.dtype == x.grad.dtype == dtype
    assert ((found - wanted).abs() <= error * (1 + wanted.abs())).all()
    assert ((x.grad - exact.grad).abs() <= 2 * error * (1 + exact.grad.abs())).all()


def test_strides_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 50)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert torch.equal(gelu_tanh(x.T), gelu_tanh(x).T)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        gelu_tanh(x)
    assert kept == [60], "the derivative, and not x as well"
