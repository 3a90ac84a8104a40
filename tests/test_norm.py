"""The addition to the residual stream with its layer normalisation: the Triton kernels against float64, alone and in a
model. On a GPU as they are, elsewhere in Triton's interpreter; tests/test_triton.py compiles them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: nothing to test, PyTorch computes everything")

from minift import modes, ops
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.ops import norm, norm_triton
from minift.ops.norm import add_norm, add_norm_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Result = tuple[Tensor, Tensor]


def operands(N: int, C: int, dtype: torch.dtype, mean: float = 0.0) -> list[Tensor]:
    """x, branch, weight, bias, and the gradients of the sum and of the norm."""
    generator = torch.Generator().manual_seed(N + C)
    drawn = [torch.randn(shape, generator=generator) for shape in ((N, C), (N, C), (C,), (C,), (N, C), (N, C))]
    drawn[0] += mean
    return [tensor.to(DEVICE, dtype) for tensor in drawn]


def results(function: Callable[..., Result], given: list[Tensor], *settings: str) -> list[Tensor]:
    """The sum, its norm, and the gradients of x and of the branch."""
    x, branch, weight, bias, dtotal, dnormed = given
    leaves = [tensor.detach().requires_grad_() for tensor in (x, branch)]
    found = function(*leaves, weight, bias, EPS, *settings)
    return [*found, *torch.autograd.grad(found, leaves, (dtotal, dnormed))]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that were called."""
    seen: list[str] = []
    for name in ("add_norm", "add_norm_backward"):
        monkeypatch.setattr(norm_triton, name, noting(getattr(norm_triton, name), name, seen))
    return seen


def noting(function: Callable, name: str, seen: list[str]) -> Callable:
    def call(*args: object) -> object:
        seen.append(name)
        return function(*args)

    return call


@pytest.mark.parametrize("N, C, dtype, mean", [
    (5, 768, torch.float32, 0.0), (1, 768, torch.bfloat16, 0.0), (3, 1601, torch.float16, 0.0),
    (4, 50, torch.bfloat16, 0.0), (2, 1, torch.float32, 0.0), (3, 97, torch.float32, 100.0),
    (2, 8192, torch.float32, 0.0)], ids=str)  # fmt: skip
def test_kernels_against_float64(launched: list[str], N: int, C: int, dtype: torch.dtype, mean: float) -> None:
    given = operands(N, C, dtype, mean)
    found = results(add_norm, given, "triton")
    assert launched == ["add_norm", "add_norm_backward"]
    exact_given = [tensor.double() for tensor in given]
    if dtype != torch.float32 or mean:  # the sum is rounded, and the norm is that of the rounded sum
        exact_given[0], exact_given[1] = found[0].detach().double(), torch.zeros_like(exact_given[1])
        if dtype != torch.bfloat16 or DEVICE.type == "cuda":  # Triton's interpreter does not round to bf16, but cuts
            assert torch.equal(found[0], given[0] + given[1])
    for ours, exact in zip(found, results(add_norm_reference, exact_given), strict=True):
        assert ours.dtype == dtype and error(ours, exact) < TOLERANCE[dtype]
    assert torch.equal(found[2], found[3])


def test_gradients_that_are_missing_or_have_strides() -> None:
    """Only one of the results is read; no rows; gradients that are views."""
    x, branch, weight, bias, *_ = operands(6, 40, torch.float32)
    exact = [tensor.double() for tensor in (x, branch, weight, bias)]
    for which in (0, 1):
        gradients = []
        for function, (first, second, w, b), settings in (
                (add_norm, (x, branch, weight, bias), ("hybrid",)), (add_norm_reference, exact, ())):
            leaf = first.detach().requires_grad_()
            result = function(leaf, second, w, b, EPS, *settings)[which]
            dy = torch.arange(6.0, dtype=w.dtype, device=DEVICE)[:, None] * w[:, None].T.expand(6, 40)
            gradients += torch.autograd.grad(result, leaf, dy.T.contiguous().T)
        assert error(*gradients) < 1e-5
    empty = x[:0].requires_grad_()
    total, normed = add_norm(empty, branch[:0], weight, bias, EPS, "triton")
    (total + normed).sum().backward()
    assert total.shape == normed.shape == empty.grad.shape == (0, 40)


def test_elsewhere_it_is_the_reference(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: other kernels, trained norms, too many channels, and --ops plain."""
    given = operands(4, 30, torch.float32)
    wanted = results(add_norm_reference, given)

    def same(*settings: str) -> None:
        assert all(map(torch.equal, results(add_norm, given, *settings), wanted))

    for kernel in ("auto", "torch"):
        same(kernel)
    x, branch, weight, bias, *_ = given
    for trained in (weight, bias):
        trained.requires_grad_()
        same("triton")
        trained.requires_grad_(False)
    found = add_norm(x, None, weight, bias, EPS, "triton")
    assert found[0] is x and torch.equal(found[1], add_norm_reference(x, None, weight, bias, EPS)[1])
    with monkeypatch.context() as patch:
        patch.setattr(ops, "plain", True)
        same("triton")
    monkeypatch.setattr(norm, "MOST_CHANNELS", 29)
    same("triton")
    assert not launched


def stand_in(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Result:
    assert branch.dtype == weight.dtype == bias.dtype == x.dtype and not weight.requires_grad and not bias.requires_grad
    assert x.shape == branch.shape and weight.shape == bias.shape == x.shape[1:]
    return add_norm_reference(x, branch, weight, bias, eps)


def backward_stand_in(dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    with torch.enable_grad():
        leaf = total.detach().requires_grad_()
        _, normed = add_norm_reference(leaf, None, weight, torch.zeros_like(weight), eps)
    [dx] = torch.autograd.grad(normed, leaf, dnormed)
    return dx if dtotal is None else dx + dtotal


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("mode", ["lora", "adapter", "prompt"])
def test_a_step_of_a_model(make_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch, mode: str, checkpoint: bool
                           ) -> None:
    """The norms of a whole model through a stand-in for the kernels: the loss and every gradient."""
    model = make_gpt().train()
    modes.apply(model, mode, modes.MODES[mode].Options())
    for parameter in modes.tuned_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))  # B would be 0
    model.checkpoint = checkpoint
    batch = model.pack([Row(list(range(40)), ((20, 40),)), Row([3] * 9, ((1, 9),))])
    seen: list[str] = []
    monkeypatch.setattr(norm_triton, "add_norm", noting(stand_in, "forward", seen))
    monkeypatch.setattr(norm_triton, "add_norm_backward", noting(backward_stand_in, "backward", seen))
    passes = []
    for kernel in ("torch", "triton"):
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.kernel = kernel  # the norms alone: the low-rank updates have their own tests
        loss = model.loss(batch)
        passes.append([loss, *torch.autograd.grad(loss, list(modes.tuned_parameters(model).values()))])
    for without, with_kernels in zip(*passes, strict=True):
        assert error(with_kernels, without.double()) < 1e-5
    layers = len(model.h)
    # all norms but the first; with checkpoints the first of a block has nothing to add, and the second runs twice
    wanted = (2 * layers + 1, layers + 1) if checkpoint else (2 * layers, 2 * layers)
    assert (seen.count("forward"), seen.count("backward")) == wanted


def test_a_kernel_is_chosen_for_all_norms(make_gpt: Callable[..., GPT]) -> None:
    model = make_gpt()
    model.set_kernel("triton")
    assert {module.kernel for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {"triton"}
