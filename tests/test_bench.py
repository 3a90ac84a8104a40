"""python -m minift.bench kernels, on a layer so small that only its form can be tested."""

import json

import pytest
from scripts import run

from minift import bench, bench_kernels


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "cache_bytes", lambda device: 2**20)
    ended = run(bench.main, "kernels", "--quick", "--shapes", "32x96", "--tokens", "50", "--samples", "3",
                "--dtype", "fp32", "--device", "cpu")  # fmt: skip
    assert ended.code == 0, ended.err
    result = json.loads(ended.out.splitlines()[-1])
    rows = {(row["row"], row["dropout"]): row for row in result["rows"]}
    assert {name for name, _ in rows} >= {"frozen", "eager", "function"} and len(result["not_measured"]) >= 2
    for row in rows.values():
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and 0 < row["flop_share"] and 0 < row["byte_share"]
    for p in (0, 0.1):
        assert rows["frozen", p]["over_frozen"] == rows["function", p]["over_function"] == 1
    assert "Function + addmm against eager" in ended.out and "Triton is not measured" in ended.out
    M, K, N, r = 50, 32, 96, 8
    case = bench_kernels.Case(K, N, M, r, 0.0)
    assert case.work("frozen", 2) == (4 * M * K * N, 4 * (M * K + M * N + K * N))
    assert case.work("triton", 2)[0] == 4 * M * K * N + 3 * (2 * M * K * r + 2 * M * N * r)


@pytest.mark.parametrize("wrong", [("--shapes", "32"), ("--tokens", "many"), ("--dropouts", "1")])
def test_mistakes_are_one_line(wrong: tuple[str, str]) -> None:
    ended = run(bench.main, "kernels", *wrong)
    assert ended.code == 2 and wrong[1] in ended.err and ended.err.count("\n") == 1
