"""The loss of the language-model head against torch's cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from minift.ops import cross_entropy as module
from minift.ops.cross_entropy import cross_entropy


@pytest.fixture(params=["CPU", "GPU"], autouse=True)
def device_of_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with the blocks of a CPU, and on a CPU with those of a GPU."""
    if request.param == "GPU":
        monkeypatch.setattr(module, "small_blocks", module.large_blocks)


@pytest.mark.parametrize("trains", ["both", "hidden", "weight"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: float,
                            trains: str) -> None:
    """Several blocks of tokens and of words, a repeated target, and padding, which has no part in it."""
    monkeypatch.setattr(module, "TOKEN_BLOCK", 7)
    monkeypatch.setattr(module, "GPU_TOKEN_BLOCK", 7)
    monkeypatch.setattr(module, "VOCAB_BLOCK", 13)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 12, generator=generator).to(dtype) for n in (24, 101))
    targets = torch.randint(101, (20,), generator=generator)
    targets[3] = targets[4]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = F.cross_entropy(exact[0][:20] @ exact[1].T, targets, reduction="sum") / 3
    hidden.requires_grad_(trains != "weight")
    weight = weight.float().requires_grad_(trains != "hidden")  # trained weights stay in fp32
    found = cross_entropy(hidden, weight, targets) / 3
    wanted.backward()
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=error)
    for tensor, other in zip((hidden, weight), exact, strict=True):
        if tensor.requires_grad:
            assert (tensor.grad - other.grad).norm() < error * other.grad.norm()
    if hidden.requires_grad:
        assert not hidden.grad[20:].any()


def test_the_gradient_of_a_well_known_word() -> None:
    """A target of probability 0.999: rounded to bf16 it would be 1, and nothing would be left to learn."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    cross_entropy(hidden, weight, torch.tensor([0])).backward()
    assert hidden.grad.item() == pytest.approx(7 * (torch.tensor(7.0).sigmoid().item() - 1), rel=0.02)


def test_no_target_at_all() -> None:
    """As on a rank whose share of the last batch is empty."""
    hidden, weight = torch.randn(64, 12, requires_grad=True), torch.randn(101, 12, requires_grad=True)
    cross_entropy(hidden, weight, torch.tensor([], dtype=torch.long)).backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_second_backward_pass() -> None:
    """The first one gives its gradients away; with retain_graph, another one makes them again."""
    hidden, weight = torch.randn(5, 12, requires_grad=True), torch.randn(101, 12, requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.tensor([3, 1, 4, 1, 5]))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for a, b, before in zip(first, second, kept, strict=True):
        assert torch.equal(a, before) and torch.equal(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
