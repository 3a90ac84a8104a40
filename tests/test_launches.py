"""A GPU step launches few kernels, counted without a GPU (tests/launches.py). The copies of trained parameters change
no bit."""

from collections.abc import Callable

import pytest
import torch
from launches import STEPS, LaunchCounter, count_launches

from minift import modes
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.ops.cast import cast, cast_together
from minift.ops.lora import LoRAFunction, Update

# the kernels of GPT-2 124M at 8 x 170 tokens
MOST = {"LoRA, Function": 705, "LoRA, Triton": 500, "full": 625, "selective": 245, "prompt": 340, "adapter": 620}


@pytest.mark.parametrize("step", STEPS)
def test_kernels_of_a_step(step: str) -> None:
    assert count_launches(**STEPS[step]).total() <= MOST[step]


@pytest.mark.parametrize("dropout, kernels", [(0.0, 3 + 5), (0.5, 5 + 9)])
def test_kernels_of_a_layer(dropout: float, kernels: int) -> None:
    """Three products forward and five backward. With dropout also a mask and a product with it; backward a mask, two
    products with it, and an addition. No gradient is copied or cast."""
    shapes = {"x": (64, 32), "weight": (48, 32), "bias": (48,)}
    x, weight, bias = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes.values())
    A, B = (torch.empty(shape, device="meta", requires_grad=True) for shape in [(8, 32), (48, 8)])
    update = Update((0,), 2.0, dropout, torch.empty((), dtype=torch.int64, device="meta"))
    x.requires_grad_()
    dy = torch.empty(64, 48, dtype=torch.bfloat16, device="meta")
    with LaunchCounter() as counter, cast_together([A, B], torch.bfloat16):
        counter.kernels.clear()
        LoRAFunction.apply(x, weight, bias, A, B, update, "torch").backward(dy)
    assert counter.kernels.total() == kernels
    for matrix in (A, B):
        assert matrix.grad.dtype == torch.float32 and matrix.grad.is_contiguous()


def test_an_unknown_operation_is_an_error() -> None:
    with LaunchCounter(), pytest.raises(NotImplementedError, match="aten.sort"):
        torch.empty(5, device="meta").sort()


def test_copies_exist_inside_alone() -> None:
    frozen, trained = torch.randn(3), torch.nn.Parameter(torch.randn(4))
    with pytest.raises(ZeroDivisionError), cast_together([trained], torch.bfloat16):
        copy = cast(trained, torch.bfloat16)
        assert copy is cast(trained, torch.bfloat16) and torch.equal(copy, trained.bfloat16())
        assert cast(trained, torch.float32) is trained
        assert torch.equal(cast(frozen, torch.bfloat16), frozen.bfloat16())
        raise ZeroDivisionError  # an error in the pass
    assert cast(trained, torch.bfloat16) is not copy


def test_a_pass_with_copies_changes_no_bit(make_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gpt()
    modes.apply(model, "lora", modes.MODES["lora"].Options())
    model.set_compute_dtype(torch.bfloat16)
    tuned = list(modes.tuned_parameters(model).values())
    for parameter in tuned:  # B too, which is 0 at the start
        torch.nn.init.normal_(parameter, std=0.1)
    batch = model.pack([Row(list(range(40)), ((20, 40),)), Row([3] * 9, ((1, 9),))])
    gradients = []
    for device in ("cpu", "meta"):
        monkeypatch.setattr(GPT, "device", torch.device(device))  # GPT.casts makes copies if it is not the CPU
        loss = model.loss(batch)
        gradients.append(torch.autograd.grad(loss, tuned))
    for without, with_copies in zip(*gradients, strict=True):
        assert torch.equal(without, with_copies) and without.any()
    assert not any(hasattr(parameter, "cast_copy") for parameter in tuned)
