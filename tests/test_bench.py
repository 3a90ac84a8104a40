"""python -m minift.bench, on shapes so small that only its form can be tested."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import run

from minift.bench import busy, ceilings, kernels, layers
from minift.bench import train as bench_train
from minift.bench.__main__ import main
from minift.data import row_cache
from minift.files.atomic import read_json_lines
from minift.modes import MODES
from minift.ops.lora import lora_linear

ON_CPU = ("--dtype", "fp32", "--device", "cpu")


def result_of(*arguments: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and its JSON object."""
    ended = run(main, *arguments, *ON_CPU)
    assert ended.code == 0, ended.err
    return ended.out, json.loads(ended.out.splitlines()[-1])


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that take no time to measure, and a small cache."""
    monkeypatch.setattr(ceilings, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(ceilings, "MATRIX_SIZES", {"cpu": (64, 128)})


def test_kernels(small_machine: None, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    out, result = result_of("kernels", "--quick", "--shapes", "32x96,32x96/qv", "--tokens", "50", "--samples", "3",
                            "--parts", "--out", str(file), "--rows", "frozen,eager,torch,triton")
    assert read_json_lines(file)[1:] == result["rows"]
    rows = {(row["row"], row["dropout"]): row for row in result["rows"] if "row" in row}
    assert {name for name, _ in rows} == {"frozen", "eager", "torch"} and result["not_measured"].keys() == {"triton"}
    for row in rows.values():
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and 0 < row["flop_share"] and 0 < row["byte_share"]
    for p in (0, 0.1):
        assert rows["frozen", p]["over_frozen"] == rows["torch", p]["over_torch"] == 1
    assert "Function + addmm, launch eager, 4 cases: its time is" in out and "Triton is not measured" in out
    assert "4 cases, about 0.0 minutes" in out and "32 x 96/qv, 50 tokens" in out
    products = [row for row in result["rows"] if "part" in row]
    assert len(products) == 8 and all(row["over_floor"] == row["ms"] / row["floor_ms"] for row in products)
    M, K, N, r = 50, 32, 96, 8
    case = layers.Case(K, N, M, r, 0.0)
    assert case.work("frozen", 2) == (4 * M * K * N, 4 * (M * K + M * N + K * N))
    assert case.work("triton", 2)[0] == 4 * M * K * N + 3 * (2 * M * K * r + 2 * M * N * r)


@pytest.mark.parametrize("parts", ["qv", "k"])
def test_parts_of_a_fused_matrix(parts: str) -> None:
    """Every implementation computes the same update."""
    case = layers.Case(6, 12, 50, 2, 0.0, parts)
    layer, *others = layers.make_ring(case, torch.float64, torch.device("cpu"), 2**40)
    assert len(others) == layers.MAX_RING - 1
    x, weight, bias = layer["x"], layer["weight"], layer["bias"]
    theirs = layers.eager(x, weight, bias, layer["a"], layer["b"], 0.0, case.offsets)
    ours = lora_linear(x, weight, bias, layer["a"], layer["b"], layers.SCALE, case.offsets)
    assert torch.allclose(ours, theirs) and not torch.allclose(ours, x @ weight.T + bias)
    assert case.work("function", 8)[0] - case.work("frozen", 8)[0] == len(parts) * 3 * (2 * 50 * 2 * (6 + 4))


def test_rows_of_a_whole_matrix_compute_the_same() -> None:
    case = layers.Case(8, 12, 20, 2, 0.0)
    ring = layers.make_ring(case, torch.float32, torch.device("cpu"), 0)
    chosen = [row for row in layers.NAMES if row != "compile"]
    names, _ = layers.find_rows(chosen, torch.device("cpu"))
    outputs = {name: layers.forward_of(name, case, ring)(ring[0])[0] for name in names}
    for name in set(names) - {"frozen"}:
        assert torch.allclose(outputs[name], outputs["eager"], atol=1e-5), name
    assert not torch.allclose(outputs["frozen"], outputs["eager"], atol=1e-2)


def test_a_pass_has_all_forwards_before_the_backwards() -> None:
    case = layers.Case(8, 12, 20, 2, 0.0)
    ring, order = layers.make_ring(case, torch.float32, torch.device("cpu"), 10**4), []

    def forward(layer: layers.Layer) -> tuple[torch.Tensor, list[torch.Tensor]]:
        number = next(i for i, other in enumerate(ring) if other is layer)
        order.append(("forward", number))
        y = layer["x"] @ layer["weight"].T
        y.register_hook(lambda gradient: order.append(("backward", number)))
        return y, [layer["x"]]

    layers.training_pass(forward, ring)
    numbers = list(range(len(ring)))
    assert len(ring) > 2
    assert order == [("forward", i) for i in numbers] + [("backward", i) for i in reversed(numbers)]


def test_the_rule_takes_both_launches() -> None:
    """A measurement of the rule needs the eager time and that of a graph, of this project's implementations."""
    shape = {"K": 768, "N": 2304, "M": 8192, "rank": 8, "dropout": 0.1, "parts": "qv"}
    results = [{"row": row, "launch": launch, **shape, "ms": ms} for row, launch, ms in (
        ("torch", "eager", 2.0), ("torch", "graph", 1.0), ("triton", "eager", 1.5), ("frozen", "graph", 0.5))]
    assert kernels.rule_measurements(results, "sm_90") == [
        {"gpu": "sm_90", "K": 768, "N": 2304, "parts": "qv", "n": 768, "rank": 8, "dropout": 0.1, "tokens": 8192,
         "implementation": "torch", "ms_graph": 1.0, "ms_eager": 2.0}]


@pytest.mark.parametrize("ragged", [False, True])
def test_train(ragged: bool) -> None:
    arguments = ["--batch", "2", "--tokens", "20", "--targets", "5", "--steps", "2", "--rank", "3",
                 "--dropout", "0.1"]
    if ragged:
        arguments.append("--ragged")
    out, result = result_of("train", "--size", "tiny", *arguments)
    assert [row["mode"] for row in result["rows"]] == list(MODES) and result["rank"] == 3
    for row in result["rows"]:
        assert row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"] and row["flops_per_step"] > 0
        assert f"| {row['mode']}" in out and row["tokens_per_second"] > 0 and 0 < row["share"]


@pytest.mark.parametrize("name", ["train", "decode"])
def test_beside_a_busy_program(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(busy, "SETTLE_SECONDS", 0)
    small = {"train": ["--batch", "2", "--tokens", "20", "--targets", "5", "--steps", "1"],
             "decode": ["--batch", "2", "--prompt-tokens", "10", "--new-tokens", "4", "--repeats", "1"]}
    out, result = result_of(name, "--size", "tiny", "--mode", "lora", "--busy", *small[name])
    [row] = result["rows"]
    assert len(row["quiet_rates"]) == len(row["busy_rates"]) == busy.ROUNDS
    quiet = sum(row["quiet_rates"]) / 2  # the median of two
    assert row["busy_share"] == pytest.approx(row["busy_tokens_per_second"] / quiet)
    assert "busy tokens/s | of quiet |" in out


def test_the_busy_program_has_a_session_of_its_own_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess_popen(*arguments, **settings))
        return started[0]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", popen)
    with pytest.raises(KeyError), busy.busy_program():
        assert started[0].poll() is None and os.getsid(started[0].pid) == started[0].pid != os.getsid(0)
        raise KeyError
    assert started[0].poll() is not None


def test_ragged_rows_have_the_mean_length() -> None:
    options = bench_train.TrainBenchOptions("tiny", batch=300, tokens=30, targets=5, ragged=True,
                                            steps=1)
    first, second, _ = bench_train.random_steps(options, 0)
    lengths = [len(row.ids) for row in first]
    assert lengths != [len(row.ids) for row in second]  # new rows in each step, the same in each run
    assert bench_train.random_steps(options, 0)[0] == first
    assert min(lengths) > 5 and max(lengths) <= 96 and 27 < sum(lengths) / 300 < 33
    assert all(row.spans == ((len(row.ids) - 5, len(row.ids)),) for row in first)


def test_decode() -> None:
    out, result = result_of("decode", "--size", "tiny", "--batch", "3", "--prompt-tokens", "10",
                            "--new-tokens", "4", "--repeats", "2", "--mode", "full,lora")
    assert [row["mode"] for row in result["rows"]] == ["full", "lora"]
    for row in result["rows"]:
        assert row["total_ms_min"] <= row["total_ms"] <= row["total_ms_max"]
        assert row["new_tokens_per_second"] == pytest.approx(3 * 4 / row["total_ms"] * 1e3)


def test_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 50_000)
    ended = run(main, "data", "--rows", "20,100")
    assert ended.code == 0, ended.err
    small, large = json.loads(ended.out.splitlines()[-1])["rows"]
    assert (small["rows"], large["rows"]) == (20, 100) and small["train_tokens"] < large["train_tokens"]
    assert small["cached_seconds"] is None and large["cached_seconds"] > 0
    assert large["peak_memory_bytes"] > 2**20


WRONG = [
    (["kernels", "--shapes", "32"], "32"),
    (["kernels", "--shapes", "32x32/qv"], "32x32/qv"),
    (["kernels", "--shapes", "32x33/x"], "32x33/x"),
    (["kernels", "--tokens", "many"], "--tokens many"),
    (["kernels", "--rows", "frozen,fast"], "'fast'"),
    (["kernels", "--write-rule", "--device", "cpu"], "--write-rule"),
    (["kernels", "--dropouts", "1"], "--dropouts 1"),
    (["kernels", "--dropouts", "0,nan"], "--dropouts 0,nan"),
    (["train", "--mode", "lora,lora"], "lora"),
    (["train", "--mode", "full", "--rank", "4"], "--rank is an option of mode lora"),
    (["train", "--tokens", "20", "--targets", "20"], "--targets 20"),
    (["train", "--tokens", "1025"], "1024 positions"),
    (["decode", "--new-tokens", "1"], "--new-tokens 1"),
    (["decode", "--size", "gpt5"], "gpt5"),
    (["data", "--rows", "10,many"], "--rows '10,many'"),
    ([], "train | decode | kernels | data"),
    (["speed"], "train | decode | kernels | data"),
]


@pytest.mark.parametrize("arguments, said", WRONG)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    ended = run(main, *arguments)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


def test_a_row_beyond_the_positions_is_refused() -> None:
    ended = run(main, "decode", "--size", "tiny", "--prompt-tokens", "80", "--new-tokens", "60",
                *ON_CPU)
    assert ended.code == 2 and "of the model's 96 positions" in ended.err
