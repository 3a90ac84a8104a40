"""LoRA's linear layer: its value and gradients against the reference, its dropout, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minift.ops.dropout import keep_mask
from minift.ops.lora import LoRAFunction, Update, lora_linear, lora_linear_reference

# (M or leading dimensions, K, N, r, n, offsets): q and v of a fused matrix, the whole, one part in the middle
SHAPES = {
    "q and v": ((2, 5), 6, 12, 3, 4, (0, 8)),
    "q, k and v": ((7,), 5, 9, 1, 3, (0, 3, 6)),
    "whole, rank above width": ((1, 3), 3, 7, 4, 7, (0,)),
    "k alone": ((3, 1, 2), 4, 15, 2, 5, (5,)),
}
SCALE = 2.5  # alpha / rank, and not one
SEED = torch.tensor(3)


def operands(shape: tuple, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    leading, K, N, r, n, offsets = shape
    generator = torch.Generator().manual_seed(0)
    parts = len(offsets)
    sizes = {"x": (*leading, K), "weight": (N, K), "bias": (N,), "A": (parts * r, K), "B": (parts * n, r)}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients(shape: tuple, with_bias: bool) -> None:
    given, offsets = operands(shape), shape[-1]
    if not with_bias:
        del given["bias"]

    def kernel(*tensors: Tensor) -> Tensor:
        named = {"bias": None} | dict(zip(given, tensors, strict=True))
        return lora_linear(**named, scale=SCALE, offsets=offsets)

    wanted = lora_linear_reference(**{"bias": None} | given, update=Update(offsets, SCALE))
    assert torch.allclose(kernel(*given.values()), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(kernel, tuple(given.values()))
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(kernel(*given.values()), given.values(), upstream)
    theirs = torch.autograd.grad(wanted, given.values(), upstream)
    for name, a, b in zip(given, ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11), name


def test_the_reference_is_the_formula() -> None:
    """Part by part with explicit sums, so that kernel and reference cannot share a mistake."""
    x, weight, bias, A, B = (t.detach() for t in operands(SHAPES["q and v"]).values())
    dense = torch.zeros(12, 6, dtype=torch.float64)
    for part, start in enumerate((0, 8)):
        for row in range(4):
            for rank in range(3):
                dense[start + row] += SCALE * B[part * 4 + row, rank] * A[part * 3 + rank]
    assert torch.allclose(
        lora_linear_reference(x, weight, bias, A, B, Update((0, 8), SCALE)), F.linear(x, weight + dense, bias)
    )


FROZEN = [{"weight", "bias"}, {"weight", "bias", "x"}, {"weight", "bias", "A", "B"}, {"A"}]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: "frozen " + " ".join(sorted(names)))
def test_gradients_are_made_only_where_they_are_asked_for(frozen: set[str]) -> None:
    given, offsets = operands(SHAPES["q and v"]), (0, 8)
    for name in frozen:
        given[name].requires_grad_(False)
    lora_linear(**given, scale=SCALE, offsets=offsets).sum().backward()
    assert {name for name, tensor in given.items() if tensor.grad is not None} == given.keys() - frozen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_with_dropout(shape: tuple) -> None:
    leading, K, *_, offsets = shape
    given = operands(shape) | {"x": operands(shape)["x"].detach().view(-1, K).requires_grad_(True)}
    assert 0 < keep_mask(given["x"], 0.4, SEED).double().mean() < 1

    def kernel(*tensors: Tensor) -> Tensor:
        return LoRAFunction.apply(*tensors, Update(offsets, SCALE, 0.4, SEED), "torch")

    assert torch.autograd.gradcheck(kernel, tuple(given.values()))


def test_dropout_is_that_of_the_formula() -> None:
    x, weight, bias, A, B = (t.detach() for t in operands(SHAPES["q and v"]).values())
    x = x.view(-1, 6)
    dropped = x * keep_mask(x, 0.4, SEED) / 0.6
    wanted = F.linear(x, weight, bias)
    update = lora_linear_reference(dropped, weight, None, A, B, Update((0, 8), SCALE))
    update = update - F.linear(dropped, weight)
    got = LoRAFunction.apply(x, weight, bias, A, B, Update((0, 8), SCALE, 0.4, SEED), "torch")
    assert torch.allclose(got, wanted + update)
    assert torch.equal(got[:, 4:8], wanted[:, 4:8])  # the columns between the parts are not touched


def test_lora_linear_draws_a_new_mask_each_time_from_torchs_generator() -> None:
    given = operands(SHAPES["q and v"])

    def draw() -> Tensor:
        return lora_linear(**given, scale=SCALE, offsets=(0, 8), dropout=0.5)

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert torch.equal(first, draw()) and not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(**given, scale=SCALE, offsets=(0, 8))
    assert torch.equal(state, torch.get_rng_state())  # without dropout nothing is drawn


def test_bf16_error_is_that_of_rounding() -> None:
    leading, K, N, r, n, offsets = (64,), 96, 288, 8, 96, (0, 192)
    given = {name: t.detach() for name, t in operands((leading, K, N, r, n, offsets), torch.bfloat16).items()}
    given |= {"A": given["A"].float().requires_grad_(True), "B": given["B"].float().requires_grad_(True)}
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in given.items()}
    got = lora_linear(**given, scale=SCALE, offsets=offsets)
    wanted = lora_linear_reference(**exact, update=Update(offsets, SCALE))
    upstream = torch.randn(64, N, generator=torch.Generator().manual_seed(1)).bfloat16()
    got.backward(upstream)
    wanted.backward(upstream.double())
    assert got.dtype == torch.bfloat16 and given["A"].grad.dtype == given["B"].grad.dtype == torch.float32
    for a, b in ((got, wanted), (given["A"].grad, exact["A"].grad), (given["B"].grad, exact["B"].grad)):
        assert ((a.double() - b).norm() / b.norm()).item() < 2**-7  # bf16 keeps 8 bits: 2^-9 at each rounding


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_kept_but_the_input_h_and_the_parameters(dropout: float) -> None:
    given = operands(SHAPES["q and v"], torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(**given, scale=SCALE, offsets=(0, 8), dropout=dropout)
    own = {given[name].data_ptr() for name in ("x", "weight", "A", "B")}
    others = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert others == [(10, 6)]  # h: tokens x (parts * rank)


def test_a_zero_b_changes_no_bit() -> None:
    given = operands(SHAPES["q and v"], torch.float32)
    given["B"] = torch.zeros_like(given["B"])
    y = lora_linear(**given, scale=SCALE, offsets=(0, 8))
    assert torch.equal(y, F.linear(given["x"], given["weight"], given["bias"]))


def test_empty_and_single_inputs() -> None:
    given = operands(SHAPES["q and v"])
    for leading in ((0,), (0, 3), (1,), (1, 1)):
        given["x"] = torch.ones(*leading, 6, dtype=torch.float64)
        assert lora_linear(**given, scale=SCALE, offsets=(0, 8), dropout=0.5).shape == (*leading, 12)
