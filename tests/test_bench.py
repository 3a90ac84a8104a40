"""python -m minift.bench kernels, on a layer so small that only its form can be tested."""

import json
from dataclasses import asdict

import pytest
import torch
from scripts import run
from torch._subclasses import FakeTensorMode

from minift import bench
from minift.bench import kernels as bench_kernels
from minift.ops import kernel_choice
from minift.ops.lora import lora_linear


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "cache_bytes", lambda device: 2**20)
    ended = run(bench.main, "kernels", "--quick", "--shapes", "32x96,32x96/qv", "--tokens", "50",
                "--samples", "3", "--dtype", "fp32", "--device", "cpu")  # fmt: skip
    assert ended.code == 0, ended.err
    result = json.loads(ended.out.splitlines()[-1])
    rows = {(row["row"], row["dropout"]): row for row in result["rows"]}
    assert {name for name, _ in rows} >= {"frozen", "eager", "function"} and len(result["not_measured"]) >= 2
    for row in rows.values():
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and 0 < row["flop_share"] and 0 < row["byte_share"]
    for p in (0, 0.1):
        assert rows["frozen", p]["over_frozen"] == rows["function", p]["over_function"] == 1
    assert "Function + addmm against eager" in ended.out and "Triton is not measured" in ended.out
    assert "4 cases, at least 0.0 minutes" in ended.out and "32 x 96/qv, 50 tokens" in ended.out
    M, K, N, r = 50, 32, 96, 8
    case = bench_kernels.Case(K, N, M, r, 0.0)
    assert case.work("frozen", 2) == (4 * M * K * N, 4 * (M * K + M * N + K * N))
    assert case.work("triton", 2)[0] == 4 * M * K * N + 3 * (2 * M * K * r + 2 * M * N * r)


@pytest.mark.parametrize("parts", ["qv", "k"])
def test_parts_of_a_fused_matrix(parts: str) -> None:
    """What is timed is one update by any row, and a line of it for the table is what `auto` looks for."""
    case = bench_kernels.Case(6, 12, 50, 2, 0.0, parts)
    layer, *others = bench_kernels.make_ring(case, torch.float64, torch.device("cpu"), 2**40)
    assert len(others) == bench_kernels.RING - 1
    x, weight, bias = layer["x"], layer["weight"], layer["bias"]
    theirs = bench_kernels.eager(x, weight, bias, layer["a"], layer["b"], 0.0, case.offsets)
    ours = lora_linear(x, weight, bias, layer["a"], layer["b"], bench_kernels.SCALE, case.offsets)
    assert torch.allclose(ours, theirs) and not torch.allclose(ours, x @ weight.T + bias)
    assert case.work("function", 8)[0] - case.work("frozen", 8)[0] == len(parts) * 3 * (2 * 50 * 2 * (6 + 4))


def test_the_tables_lines_are_those_that_auto_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors of a GPU that need not be here."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda device: None)
    monkeypatch.setattr(kernel_choice, "device_name", lambda device: "some GPU")
    gains = {("", 64): 0.9, ("", 128): 0.8, ("qv", 64): 1.1, ("qv", 128): 0.9, ("k", 64): 2, ("k", 128): 2}
    rows = [{"row": "triton", "launch": "eager", "over_function": gain,
             **asdict(bench_kernels.Case(64, 192, M, 8, 0.1, parts))} for (parts, M), gain in gains.items()]
    lines = list(bench_kernels.table_lines(rows, torch.device("cuda"), "bfloat16"))
    monkeypatch.setattr(kernel_choice, "TRITON_WINS", eval("{" + "".join(lines) + "}"))
    with FakeTensorMode():
        for (parts, M), gain in gains.items():
            case = bench_kernels.Case(64, 192, M, 8, 0.1, parts)
            x, weight, B = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in
                            ((M, 64), (192, 64), (len(case.offsets) * case.n, 8)))
            assert kernel_choice.triton_wins(x, weight, B, len(case.offsets), 0.1) == (gain < 1), case


WRONG = [("--shapes", "32"), ("--shapes", "32x32/qv"), ("--shapes", "32x33/x"), ("--tokens", "many"),
         ("--dropouts", "1")]


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_one_line(wrong: tuple[str, str]) -> None:
    ended = run(bench.main, "kernels", *wrong)
    assert ended.code == 2 and wrong[1] in ended.err and ended.err.count("\n") == 1
