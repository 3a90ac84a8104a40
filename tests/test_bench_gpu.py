"""python -m minift.bench gpu, by its dry run on a CPU: nothing here says how a GPU behaves."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scripts import Ended, run
from test_graphs import REPLAYS, on_cpu  # noqa: F401  (a fixture)

pytest.importorskip("triton", reason="triton is not installed: the dry run has no kernels to check")

from minift.bench import gpu_checks, layers, parts, timing
from minift.bench import train as bench_train
from minift.bench.__main__ import main
from minift.bench.gpu import NO_TIME
from minift.bench.gpu_stages import STAGES
from minift.bench.gpu_training import TrainUnit, train_options, train_units
from minift.bench.report import DRY, Report
from minift.bench.targets import NOT_MEASURED, readme_lines, targets
from minift.bench.train import TrainBenchOptions
from minift.modes import MODES
from minift.ops.kernel_choice import KERNELS, RULE_FILE, check_kernel

CPU = torch.device("cpu")
BROKEN = "raise ImportError('broken on purpose')"


class Dry(NamedTuple):
    """How a dry run ended, and its two files."""

    ended: Ended
    markdown: str
    stages: dict[str, Any]


def dry_run(folder: Path, *arguments: Any) -> Dry:
    ended = run(main, "gpu", "--dry", "--out", folder, *arguments)
    report = json.loads((folder / "report.json").read_text())
    return Dry(ended, (folder / "report.md").read_text(), report["stages"])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dry]:
    """All stages, with a transformers that cannot be imported: that also saves the ten seconds of its import."""
    stub, rule = tmp_path_factory.mktemp("stub"), RULE_FILE.read_bytes()
    for package in ("transformers", "peft"):
        (stub / f"{package}.py").write_text(BROKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(stub))
        patch.syspath_prepend(str(stub))
        patch.setenv("TRITON_INTERPRET", "1")
        yield dry_run(tmp_path_factory.mktemp("report"))
    assert RULE_FILE.read_bytes() == rule  # a dry run leaves the project's rule alone


def test_every_stage_of_a_dry_run(full: Dry) -> None:
    assert full.ended.code == 0, full.ended.err
    assert list(full.stages) == [stage.name for stage in STAGES]
    for name, stage in full.stages.items():
        assert stage["results"] and not stage["not_measured"], name
        assert f"## {stage['title']}" in full.markdown and f"## {stage['title']}" in full.ended.out
    assert DRY in full.markdown and DRY in full.ended.out
    assert NOT_MEASURED in full.markdown  # the targets are about GPT-2, which a dry run leaves out
    checks = full.stages["checks"]["results"]
    assert {result["verdict"] for result in checks} == {"right"}
    for kernel in KERNELS[1:]:
        assert sum(result["check"].startswith(f"{kernel}, ") for result in checks) >= 4  # y, dx, dA, dB
    assert {result["mode"] for result in full.stages["train"]["results"]} == set(MODES)
    assert {result["kernel"] for result in full.stages["rule"]["results"]} == {"torch"}
    assert "tokens/s, 64 rows" in full.ended.out  # the table for the README


def test_a_failing_unit_costs_only_itself(full: Dry) -> None:
    failed = {name: stage["failed"] for name, stage in full.stages.items() if stage["failed"]}
    assert failed.keys() == {"peer"}
    [(unit, reason)] = failed["peer"]
    assert "broken on purpose" in reason and f"- failed: {unit}: {reason}" in full.markdown
    assert [result["program"] for result in full.stages["peer"]["results"]] == ["minift"]
    assert full.stages["decode"]["results"]  # the stage after it


def test_a_lost_process_and_a_signal(full: Dry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures is killed after the first mode, the leading one gets SIGTERM after the third."""
    add = Report.add

    def add_and_interrupt(report: Report, stage: str, result: dict[str, Any]) -> None:
        add(report, stage, result)
        train = report.sections["train"]
        if len(train.results) == 1:
            [process] = multiprocessing.active_children()
            os.kill(process.pid, signal.SIGKILL)
        if len(train.results) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "add", add_and_interrupt)
    dry = dry_run(tmp_path, "--stages", "train,decode")
    assert dry.ended.code == 128 + signal.SIGTERM
    assert dry.ended.err.count("\n") == 1 and "stopped by SIGTERM" in dry.ended.err
    train, decode = dry.stages["train"], dry.stages["decode"]
    assert [reason for _, reason in train["failed"]] == ["its process died"]
    lost = [train["failed"][0][0], *(unit for unit, _ in train["not_measured"])]
    assert len(train["results"]) >= 3 and len(train["results"]) + len(lost) >= len(train_units(True))
    assert {reason for _, reason in train["not_measured"] + decode["not_measured"]} == {"stopped by SIGTERM"}
    assert decode["not_measured"] and not decode["results"]
    assert not multiprocessing.active_children()


def test_the_end_of_the_time(tmp_path: Path) -> None:
    dry = dry_run(tmp_path, "--minutes", "1e-9", "--stages", "checks,decode")
    assert dry.ended.code == 0 and not dry.stages["checks"]["results"]
    assert dry.stages["decode"]["not_measured"] == [["lora, tiny, 2 rows", NO_TIME]]
    assert f"- not measured: lora, tiny, 2 rows: {NO_TIME}" in dry.markdown


@pytest.mark.parametrize("arguments, said", [
    (["--stages", "checks,speed"], "there is no speed"),
    (["--minutes", "0"], "--minutes 0"),
    (["--dry", "--out", str(RULE_FILE / "x")], "--out"),
    pytest.param([], "there is no GPU here: --dry", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU, and this would use it")),
])
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    ended = run(main, "gpu", *arguments)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


# ---- the half hour's own units, which run on a GPU alone

def test_the_units_of_the_half_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options are allowed, and the figures of the targets come first."""
    units = {stage.name: stage.units(False) for stage in STAGES}
    assert all(units.values())
    for unit in units["train"].values():
        options = train_options(unit.size, unit.batch, unit.ragged, False)
        bench_train.check(options, [unit.mode])
        check_kernel(unit.kernel or "auto", CPU)  # the interpreter is here, so each is known
        settings = bench_train.train_settings(replace(options, device="cpu", graphs=unit.graphs))
        assert settings.graphs == unit.graphs and settings.batch == unit.batch
    first = list(units["train"].values())[0]
    assert first == TrainUnit("gpt2", "lora", 8, "auto") and options.tokens - 1 == 170
    assert {(unit.size, unit.mode) for unit in units["train"].values()} == {
        (size, mode) for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") for mode in MODES}
    assert set(layers.OUR_KERNELS) <= layers.NAMES.keys()
    for unit in units["kernels"].values():
        assert set(unit.rows) <= layers.NAMES.keys() and unit.case.work("torch", 2)
    assert {unit.case.M for unit in units["kernels"].values()} == {2048, 8192, 16384}


@pytest.mark.usefixtures("on_cpu")
def test_steps_from_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for graphs and flash attention: the timed steps replay, and the check compares the losses."""
    options = TrainBenchOptions("tiny", batch=2, tokens=20, targets=5, steps=2, device="cpu", dtype="fp32", graphs="on")
    result = bench_train.measure("lora", MODES["lora"].Options(), options, torch.float32, CPU)
    assert result["graphs"] == "on" and len(REPLAYS) == 3 and result["flops_per_step"] > 0
    [same] = gpu_checks.check_graphs("lora", CPU)
    assert same["verdict"] == "right"


def test_a_check_sees_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(check: Iterator[dict[str, Any]]) -> set[str]:
        return {result["verdict"] for result in check}

    assert verdicts(gpu_checks.check_attention(torch.float32, CPU)) == {"right"}
    attention = gpu_checks.attention
    monkeypatch.setattr(gpu_checks, "attention", lambda *given: attention(*given) * 1.001)
    assert verdicts(gpu_checks.check_attention(torch.float32, CPU)) == {"WRONG"}
    update = gpu_checks.lora_linear
    case = layers.Case(24, 36, 20, 3, 0.3, "qv")
    monkeypatch.setattr(gpu_checks, "lora_linear", lambda **given: update(
        **given | {"scale": 2.01 if given["x"].dtype == torch.float32 else 2.0}))
    assert "WRONG" in verdicts(gpu_checks.check_layer(case, "torch", torch.float32, CPU))
    assert gpu_checks.verdict("nan", float("nan"), 1.0)["verdict"] == "WRONG"


def test_each_kernel_alone() -> None:
    """In Triton's interpreter: that each can be called, not its speed."""
    case, facts = layers.Case(16, 48, 20, 3, 0.1, "qv"), {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    ring = layers.make_ring(case, torch.float32, CPU, 0)
    found = {result["part"]: result for result in parts.measure(case, ring, layers.OUR_KERNELS, 1, facts)}
    assert len(found) == 14 and all(result["ms"] > 0 for result in found.values())
    assert found["y = x W^T, torch"]["floor_ms"] == pytest.approx(2 * 20 * 16 * 48 / 1e9 * 1e3)  # bound by its FLOPs
    few_bytes = 4 * (20 * 16 + 20 * 6) + 4 * 6 * 16
    assert found["dA = g^T x, outer"]["floor_ms"] == pytest.approx(max(2 * 20 * 6 * 16, few_bytes) / 1e9 * 1e3)


def test_times_of_a_gpu_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for events, on a clock that each call moves by 2 ms."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool = False):
            assert enable_timing

        def record(self) -> None:
            self.time, self.waited = clock[0], False

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: "Event") -> float:
            assert end.waited or end.time < clock[0]
            return end.time - self.time  # ms

    def work() -> None:
        clock[0] += 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = torch.device("cuda")
    assert timing.sample_seconds(work, 4, gpu) == pytest.approx(2e-3)
    assert timing.calls_per_sample(work, gpu) == 5  # 10 ms
    assert timing.time_each([work, work, work], gpu) == pytest.approx([2e-3] * 3)
    assert timing.time_in_turn({"a": work, "b": work}, 2, gpu) == {"a": [pytest.approx(2e-3)] * 2,
                                                                  "b": [pytest.approx(2e-3)] * 2}


def test_targets() -> None:
    layer = {"table": "layers", "K": 768, "N": 3072, "M": 8192, "parts": "", "rank": 16, "dropout": 0.0}
    layer |= {"launch": "graph"}
    training = {"table": "train", "mode": "lora", "size": "gpt2", "rows": "equal"}
    training |= {"attention": "packed", "graphs": None}
    peer = {"table": "peer", "mode": "lora", "batch": 8, "rows": "equal"}
    results = [
        layer | {"row": "eager", "ms": 1.0}, layer | {"row": "torch", "ms": 0.9}, layer | {"row": "hybrid", "ms": 0.5},
        layer | {"row": "eager", "ms": 1.0, "N": 768}, layer | {"row": "torch", "ms": 0.8, "N": 768},
        training | {"batch": 8, "kernel": "auto", "tokens_per_second": 500_000, "product_share": 0.2},
        training | {"batch": 8, "kernel": "torch", "tokens_per_second": 400_000, "product_share": 0.1},
        peer | {"program": "minift", "tokens_per_second": 500_000},
        peer | {"program": "stack", "tokens_per_second": 50_000},
        peer | {"program": "stack, no cuDNN", "tokens_per_second": 125_000},
    ]
    assert "| lora" in readme_lines(results)[-1] and "500,000" in readme_lines(results)[-1]
    found = {one["target"]: (one["measured"], one["met"]) for one in targets(results)}
    missing = (NOT_MEASURED, NOT_MEASURED)
    assert list(found.values()) == [("1.25", "no"), missing, missing, missing, missing, ("1.25", "yes"),
                                    ("500,000", "yes"), missing, ("4.0", "no"), missing]
