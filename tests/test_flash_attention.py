"""Attention over packed rows by torch's FlashAttention: the call, and its results through a stand-in; on a GPU the real
one."""

from typing import Any

import pytest
import torch
from packed import flash_stand_in, packed_rows
from torch import Tensor

from minift.ops import attention as module
from minift.ops import flash_attention as flash_module
from minift.ops.attention import attention, attention_reference
from minift.ops.flash_attention import flash_attention, takes_flash
from minift.plan import MemoryMeter, flops

SEQLENS, REAL, HEADS, HEAD_SIZE, SCALE = [5, 48, 1, 33], 87, 3, 8, 0.3
ROWS = packed_rows(SEQLENS)  # 96 tokens, 9 of them filler
N, C = len(ROWS.positions), HEADS * HEAD_SIZE
CALLS: list[dict[str, object]] = []
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def stand_in(q: Tensor, k: Tensor, v: Tensor, *others: Any, scale: float) -> tuple[Tensor, ...]:
    for x in (q, k, v):
        assert x.shape == (N, HEADS, HEAD_SIZE) and x.stride() == (3 * C, HEAD_SIZE, 1)
    CALLS.append({"dropout": others[4], "scale": scale, "max": others[2]})
    return flash_stand_in(q, k, v, *others, scale=scale)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    monkeypatch.setattr(flash_module, "flash_op", stand_in)
    monkeypatch.setattr(module, "takes_flash", lambda qkv, n_head: True)
    CALLS.clear()
    return CALLS


def random_qkv(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 3 * C, generator=generator, dtype=torch.float64).to(device, dtype)


def test_the_call_and_its_results(flash: list[dict[str, object]]) -> None:
    """All tokens have finite outputs and gradients, the filler too: the low-rank update sums over all of them."""
    qkv = random_qkv().requires_grad_()
    exact = qkv.detach().clone().requires_grad_()
    found, wanted = attention(qkv, ROWS, HEADS, SCALE, 0.0), attention_reference(exact, ROWS, HEADS, SCALE, 0.0)
    dy = torch.randn(N, C, dtype=torch.float64)
    dy[REAL:] = 0
    found.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(found[:REAL], wanted[:REAL])
    torch.testing.assert_close(qkv.grad, exact.grad)
    assert found.isfinite().all() and not qkv.grad[REAL:].any()
    attention(qkv, ROWS, HEADS, SCALE, 0.25)
    assert flash == [{"dropout": 0.0, "scale": SCALE, "max": 48}, {"dropout": 0.25, "scale": SCALE, "max": 48}]


def test_the_filler_may_be_the_longest_row() -> None:
    rows = packed_rows([40, 1])
    assert rows.cu_seqlens.tolist() == [0, 40, 41, 96] and rows.max_seqlen == 40 and rows.max_cu_seqlen == 55


def test_torchs_operator_takes_the_call() -> None:
    """Forward and backward on tensors without values: shapes, dtypes and the gradient's formula."""
    qkv = torch.empty(N, 3 * C, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(6, dtype=torch.int32, device="meta")
    seen = []

    class Seen(MemoryMeter):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            result = func(*args, **(kwargs or {}))
            if "_flash_attention" in str(func):
                seen.append((func.overloadpacket.__name__, args, flops(func, args, result)))
            return result

    with Seen("meta", None):
        y = flash_attention(qkv, cu_seqlens, 48, HEADS, SCALE, 0.1)
        y.sum().backward()
    assert y.shape == (N, C) and y.dtype == qkv.grad.dtype == torch.bfloat16 and qkv.grad.shape == (N, 3 * C)
    (forward, args, forward_flops), (backward, back_args, backward_flops) = seen
    assert (forward, backward) == ("_flash_attention_forward", "_flash_attention_backward")
    assert args[5:] == (48, 48, 0.1, True, False) and back_args[8:12] == (48, 48, 0.1, True)
    assert (forward_flops, backward_flops) == (4 * N * C * 48, 10 * N * C * 48)  # as the plan counts them


def test_other_tensors_take_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, a CPU, a head size that the kernels lack, an older GPU."""
    from torch._subclasses import FakeTensorMode
    flash = {"here": True}
    monkeypatch.setattr(flash_module, "has_flash", lambda device: flash["here"])
    with FakeTensorMode():
        def qkv(dtype: torch.dtype, head_size: int = 64, device: str = "cuda") -> Tensor:
            return torch.empty(32, 3 * 2 * head_size, dtype=dtype, device=device)

        assert takes_flash(qkv(torch.bfloat16), 2) and takes_flash(qkv(torch.float16, 256), 2)
        for other in (qkv(torch.float32), qkv(torch.float64), qkv(torch.bfloat16, 264), qkv(torch.bfloat16, 20),
                      qkv(torch.bfloat16, device="cpu")):
            assert not takes_flash(other, 2)
        flash["here"] = False
        assert not takes_flash(qkv(torch.bfloat16), 2)


def test_padded_rows_have_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN makes a plan for each."""
    shapes = set()
    padded = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention",
                        lambda q, *others, **named: shapes.add(tuple(q.shape)) or padded(q, *others, **named))
    for longest in (33, 48, 64, 65, 100):
        rows = packed_rows([longest, 7])
        module.padded_attention(torch.randn(len(rows.positions), 3 * C), rows, HEADS, SCALE, 0.0)
    assert shapes == {(2, HEADS, 64, HEAD_SIZE), (2, HEADS, 128, HEAD_SIZE)}


@needs_gpu
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)])
def test_on_a_gpu_against_float64(dtype: torch.dtype, error: float) -> None:
    """And without values in memory that no kernel writes: freed memory full of NaN is taken again."""
    rows = packed_rows(SEQLENS, device="cuda")
    qkv = random_qkv(dtype, "cuda").requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    dy = torch.randn(N, C, dtype=torch.float64, device="cuda")
    dy[REAL:] = 0
    for size in (N * C, N * 3 * C):
        torch.full((size,), torch.nan, dtype=dtype, device="cuda")
    found, wanted = attention(qkv, rows, HEADS, SCALE, 0.0), attention_reference(exact, rows, HEADS, SCALE, 0.0)
    found.backward(dy.to(dtype))
    wanted.backward(dy)
    assert (found[:REAL] - wanted[:REAL]).norm() < error * wanted[:REAL].norm()
    assert (qkv.grad - exact.grad).norm() < error * exact.grad.norm() and found.isfinite().all()


@needs_gpu
def test_dropout_on_a_gpu() -> None:
    """The kept weights have mean 1, and a seed gives the same mask again, forward and backward."""
    rows = packed_rows(SEQLENS, device="cuda")
    qkv = random_qkv(torch.bfloat16, "cuda")
    qkv[:, 2 * C :] = 1
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        given = qkv.clone().requires_grad_()
        y = attention(given, rows, HEADS, SCALE, 0.3)
        y[:REAL].sum().backward()
        runs.append((y[:REAL], given.grad))
    (y, grad), (y_again, grad_again) = runs
    assert torch.equal(y, y_again)
    torch.testing.assert_close(grad, grad_again, atol=1e-2, rtol=1e-2)  # the kernel adds the parts of dq in any order
    assert y.mean().item() == pytest.approx(1, abs=0.15) and y.std() > 0.1
