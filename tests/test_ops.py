"""Every op's fast version against its plain reference, which is the same function with `ops.plain`.

For dropout, whose fast version has no backward pass of its own: tests/test_dropout.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from minift import ops
from minift.device import uses_onednn_bf16
from minift.ops import cross_entropy, gelu, linear, lora

# The largest relative error, against float64, of a result or a gradient. bf16 keeps 8 bits: 2^-9 a rounding.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7}


class Case(NamedTuple):
    """A call of an op: `call(*tensors)`, of tensors with these sizes."""

    call: Callable[..., Tensor]
    sizes: list[tuple[int, ...]]
    fast: type[torch.autograd.Function]  # the fast version


def linear_case(M: int, K: int, N: int, with_bias: bool = True) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear.linear(x, weight, bias)

    sizes = [(M, K), (N, K), (N,)]
    return Case(call, sizes if with_bias else sizes[:2], linear.FastLinear)


def gelu_case(*size: int) -> Case:
    return Case(gelu.gelu_tanh, [size], gelu.FastGELU)


def cross_entropy_case(n: int, padding: int, C: int, V: int) -> Case:
    targets = torch.randint(V, (n,), generator=torch.Generator().manual_seed(1))

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy.cross_entropy(hidden, weight, targets)

    return Case(call, [(n + padding, C), (V, C)], cross_entropy.FusedCrossEntropy)


def lora_case(M: int, K: int, N: int, rank: int, n: int, offsets: tuple[int, ...], rate: float = 0.0) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(7)  # both versions draw the same mask
        return lora.lora_linear(x, weight, bias, A, B, 0.5, offsets, rate)

    parts = len(offsets)
    return Case(call, [(M, K), (N, K), (N,), (parts * rank, K), (parts * n, rank)], lora.LoRAFunction)


CASES = {
    "linear, one token": linear_case(1, 24, 41),
    "linear, few tokens": linear_case(32, 64, 768),
    "linear, few tokens without bias": linear_case(7, 24, 41, with_bias=False),
    "linear, pieces of tokens": linear_case(640, 64, 768),
    "linear, pieces of outputs": linear_case(79, 24, 41),
    "linear, pieces without bias": linear_case(60, 24, 41, with_bias=False),
    "linear, many tokens": linear_case(301, 64, 129),
    "linear, many outputs": linear_case(1300, 24, 1283),
    "gelu, ragged": gelu_case(3, 7, 13),
    "gelu, several blocks": gelu_case(301, 703),
    "cross-entropy, ragged": cross_entropy_case(5, 2, 12, 101),
    "cross-entropy, several blocks": cross_entropy_case(300, 20, 16, 9001),
    "cross-entropy, blocks filled": cross_entropy_case(512, 0, 16, 8192),
    "lora, ragged": lora_case(37, 23, 45, 3, 15, (0, 30)),
    "lora, ragged with dropout": lora_case(37, 23, 45, 3, 15, (0, 30), 0.3),
    "lora, one part": lora_case(64, 96, 96, 8, 96, (0,)),
    "lora, q and v with dropout": lora_case(192, 96, 288, 8, 96, (0, 192), 0.1),
}


def make_tensors(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Each with variance 1 / K, if it is (rows, K), apart from the input."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in case.sizes]
    scaled = [tensors[0], *(tensor / tensor.shape[-1] ** 0.5 for tensor in tensors[1:])]
    return [tensor.to(dtype).requires_grad_() for tensor in scaled]


def value_and_gradients(case: Case, tensors: list[Tensor], times: int = 1) -> list[Tensor]:
    """The result, and the gradients of all tensors: each as often as there are backward passes."""
    y = case.call(*tensors)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y.dtype)
    results = [y.detach()]
    for i in range(times):
        results += torch.autograd.grad(y, tensors, dy, retain_graph=i + 1 < times)
    return results


def uses_onednn_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or uses_onednn_bf16(device, dtype)


@pytest.fixture
def onednn_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the linear layer's fast version compute in fp32 too, so that its errors show, on any processor."""
    monkeypatch.setattr(linear, "uses_onednn_bf16", uses_onednn_in_fp32)


@pytest.mark.usefixtures("onednn_in_fp32")
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_reference_in_float64(
    monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, plain: bool
) -> None:
    tensors = make_tensors(case, dtype)
    exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    monkeypatch.setattr(ops, "plain", True)
    exact = value_and_gradients(case, exact_tensors)
    monkeypatch.setattr(ops, "plain", plain)
    found = value_and_gradients(case, tensors)
    assert [t.dtype for t in found[1:]] == [dtype] * len(tensors)
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert a.shape == b.shape
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm(), f"result {i}"


@pytest.mark.usefixtures("onednn_in_fp32")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_gradients_the_value_is_the_same(case: Case) -> None:
    tensors = make_tensors(case, torch.float32)
    with torch.no_grad():
        value = case.call(*tensors)
    assert torch.equal(value, case.call(*tensors))


@pytest.mark.usefixtures("onednn_in_fp32")
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_second_backward_pass_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, case: Case, plain: bool
) -> None:
    monkeypatch.setattr(ops, "plain", plain)
    _, *gradients = value_and_gradients(case, make_tensors(case, torch.float32), times=2)
    half = len(gradients) // 2
    assert all(map(torch.equal, gradients[:half], gradients[half:]))


@pytest.mark.usefixtures("onednn_in_fp32")
@pytest.mark.parametrize("name", ["linear, few tokens", "gelu, several blocks", "cross-entropy, ragged",
                                  "lora, ragged"])  # fmt: skip
def test_the_switch_takes_the_reference(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The fast version fails here, so only the reference can give a result."""

    class FastVersionRuns(Exception):
        pass

    def fail(*args: object) -> None:
        raise FastVersionRuns

    case = CASES[name]
    monkeypatch.setattr(case.fast, "apply", fail)
    tensors = make_tensors(case, torch.bfloat16 if name.startswith("gelu") else torch.float32)
    with pytest.raises(FastVersionRuns):
        case.call(*tensors)
    monkeypatch.setattr(ops, "plain", True)
    assert case.call(*tensors).isfinite().all()
