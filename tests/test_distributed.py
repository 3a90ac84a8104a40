"""Two processes on one machine (torchrun, gloo) compute what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    ROOT,
    Ended,
    assert_same_tensors,
    files,
    interrupt,
    json_of,
    metrics,
    step_losses,
    tensors,
    train,
    trained,
    write_pairs,
)

from minift import distributed, trials
from minift.files import safetensors

# 26 rows in batches of 5, two a step: the last batch of an epoch is one row, and a process has none of it
SHORT = (
    "--steps 8 --batch 5 --accumulate 2 --order file --eval-every 3 --dtype fp32 --device cpu --test-rows 5 "
    "--val-rows 5 --max-new-tokens 4 --lr 1e-3"
).split()
# train.py, in which one rank gets a signal at its n-th step
AT_STEP = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from minift.errors import run_script
train_step, steps = train.train_step, 0
def step(*arguments):
    global steps
    steps += 1
    if os.environ["RANK"] == "{rank}" and steps == {step}:
        os.kill(os.getpid(), signal.{number})
    return train_step(*arguments)
train.train_step = step
run_script(train.main)
"""
# train.py, which reads the loss of a step after the next one has begun, as on GPUs
LATE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from minift import training
from minift.errors import run_script
train.reads_late = training.reads_late = lambda device: True
run_script(train.main)
"""


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs", rows=26)
    return ["--model", str(model_folder), "--data", str(pairs), *SHORT]


def torchrun(tmp_path: Path, *arguments: Any, program: Any = ROOT / "train.py") -> Ended:
    """Two processes; torchrun's own messages are not in `err`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    logs = ["--redirects", "2", "--log-dir", tmp_path / "logs"]
    done = subprocess.run(
        [*map(str, [*launch, *logs, program, *arguments])],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    logs = sorted((tmp_path / "logs").rglob("stderr.log"), key=lambda path: path.stat().st_mtime)[-2:]
    return Ended(done.returncode, done.stdout, "".join(path.read_text() for path in logs))


def at_step(tmp_path: Path, step: int, rank: int, number: str) -> Path:
    program = tmp_path / f"{number}.py"
    program.write_text(AT_STEP.format(root=str(ROOT), step=step, rank=rank, number=number))
    return program


def run_files(folder: Path) -> set[str]:
    """The files of a run but for its pictures, which runs in this process do not draw."""
    return {name for name in files(folder) if not name.endswith(".png")}


def assert_same_losses(one: Path, other: Path) -> None:
    """Every loss, norm and tuned tensor is equal up to rounding; files, names and shapes are equal."""
    assert run_files(one) == run_files(other)
    here, there = metrics(one), metrics(other)
    assert len(here) == len(there) and len(step_losses(one)) == 8
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name, value in a.items():
            if value is None:  # there is no training loss at step 0
                assert b[name] is None
            else:
                assert value == pytest.approx(b[name], rel=1e-4, abs=1e-5, nan_ok=True), name
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) < 1e-5
    for name in ("tuned.safetensors", "last.safetensors"):
        a, b = tensors(one / name), tensors(other / name)
        assert list(a) == list(b)
        for key in a:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
            assert torch.allclose(a[key], b[key], rtol=1e-2, atol=1e-4), key
    a, b = (json_of(folder / "result.json") for folder in (one, other))
    for name in ("steps", "best_step", "trainable_parameters", "stopped_early"):
        assert a[name] == b[name]
    for name in ("best_val_loss", "test_loss", "base_test_loss", "token_accuracy"):
        assert a[name] == pytest.approx(b[name], abs=1e-4)


@pytest.mark.parametrize(
    "options", [["--mode", "full,lora"], ["--mode", "all", "--shard", "--checkpoint"]], ids=["ddp", "fsdp"]
)
def test_two_processes_compute_what_one_computes(common: list[str], tmp_path: Path, options: list[str]) -> None:
    alone = trained(*common, *(o for o in options if o != "--shard"), "--out", tmp_path / "one")
    program = ROOT / "train.py"
    if "--shard" in options:
        program = tmp_path / "late.py"
        program.write_text(LATE)
    ended = torchrun(tmp_path, *common, *options, "--out", tmp_path / "two", program=program)
    assert ended.code == 0 and ended.err == ""
    lines = [line for line in ended.out.splitlines() if not line.startswith("  shard")]
    assert len(lines) == len(alone.splitlines())  # one process prints
    modes = [result["mode"] for result in json_of(tmp_path / "one" / "compare.json")]
    for mode in modes:
        assert_same_losses(tmp_path / "one" / mode, tmp_path / "two" / mode)
    assert run_files(tmp_path / "one") == run_files(tmp_path / "two")


def test_a_rank_that_dies_ends_the_run_and_one_process_resumes_it(common: list[str], tmp_path: Path) -> None:
    trained(*common, "--mode", "adapter", "--out", tmp_path / "one")
    dies = at_step(tmp_path, 5, 1, "SIGKILL")
    ended = torchrun(tmp_path, *common, "--mode", "adapter", "--out", tmp_path / "x", program=dies)
    assert ended.code == 1 and ended.err.count("\n") == 1
    assert ended.err.startswith("error: a process of this run is gone")
    assert f"train.py --resume {tmp_path / 'x'} continues" in ended.err
    assert len(step_losses(tmp_path / "x")) == 4 and not (tmp_path / "x" / "result.json").exists()
    trained("--resume", tmp_path / "x")
    assert_same_losses(tmp_path / "one", tmp_path / "x")


def test_two_processes_resume_the_run_of_one(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(*common, "--mode", "selective", "--out", tmp_path / "one")
    interrupt(monkeypatch, (4,))
    assert train(*common, "--mode", "selective", "--out", tmp_path / "x").code == 143
    ended = torchrun(tmp_path, "--resume", tmp_path / "x")
    assert ended.code == 0 and ended.err == ""
    assert_same_losses(tmp_path / "one", tmp_path / "x")


def test_a_sharded_run_stops_as_one_and_resumes_bit_for_bit(common: list[str], tmp_path: Path) -> None:
    """One rank alone gets the signal. Dropout draws the same again."""
    options = [*common, "--mode", "lora", "--shard", "--dropout", "0.2", "--model-dropout", "0.1"]
    assert torchrun(tmp_path, *options, "--out", tmp_path / "whole").code == 0
    stops = at_step(tmp_path, 5, 1, "SIGTERM")
    ended = torchrun(tmp_path, *options, "--out", tmp_path / "x", program=stops)
    assert ended.code == 1 and ended.err == ""
    assert ended.out.count(f"stopped after step 5; python train.py --resume {tmp_path / 'x'} continues") == 1
    assert '"step": 5' in safetensors.read(tmp_path / "x" / "last.safetensors")[1]["progress"]
    assert torchrun(tmp_path, "--resume", tmp_path / "x").code == 0
    assert_same_tensors(tmp_path / "whole", tmp_path / "x")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "x")


def test_dropout_differs_between_ranks_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank, step in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 1)):
        monkeypatch.setattr(distributed, "RANK", rank)
        distributed.seed_step(7, step)
        drawn.append(tuple(torch.rand(4).tolist()))
    assert len(set(drawn)) == 4 and drawn[3] == drawn[4]


def test_an_error_is_printed_once(common: list[str], tmp_path: Path) -> None:
    """One that every rank meets, one that rank 0 alone meets, and a script for one process."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("years of work")
    for arguments, program, words in (
        (["--batch", 0], "train.py", "--batch 0"),
        ([*common, "--out", tmp_path / "x"], "train.py", "exists already"),
        ([tmp_path / "x"], "eval.py", "without torchrun"),
    ):
        ended = torchrun(tmp_path, *arguments, program=ROOT / program)
        assert ended.code == 1 and ended.err.startswith("error: ") and words in ended.err
        assert ended.err.count("\n") == 1
    assert list(files(tmp_path / "x")) == ["thesis.txt"]


def test_sharding_needs_processes(common: list[str], tmp_path: Path) -> None:
    ended = train(*common, "--shard", "--out", tmp_path / "x")
    assert ended.code == 2 and "torchrun" in ended.err and not (tmp_path / "x").exists()


# train.py, which stops trials that are hardly behind
NEAR = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from minift import trials
from minift.errors import run_script
trials.BEHIND, trials.LEAST_GAP = 1.01, 0
run_script(train.main)
"""


def test_two_processes_search_as_one(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a trial that fails on every rank, one that stops on every rank, and a repetition."""
    options = [*common, "--mode", "full", "--lr", "1e30,1e-3,1e-5", "--eval-every", 1, "--seeds", 2]
    monkeypatch.setattr(trials, "BEHIND", 1.01)
    monkeypatch.setattr(trials, "LEAST_GAP", 0)
    trained(*options, "--out", tmp_path / "one")
    (tmp_path / "near.py").write_text(NEAR)
    ended = torchrun(tmp_path, *options, "--out", tmp_path / "two", program=tmp_path / "near.py")
    assert ended.code == 0 and ended.err == ""
    here, there = ([json.loads(line) for line in (tmp_path / name / "trials.jsonl").read_text().splitlines()]
                   for name in ("one", "two"))
    assert [line["chosen"] for line in here] == [line["chosen"] for line in there] == [False, True, False]
    assert here[2]["stopped"] == there[2]["stopped"] == "at step 2, behind lr 0.001"
    losses = [[line["val_loss"] for line in lines] for lines in (here, there)]
    assert losses[0][0] is losses[1][0] is None
    assert losses[0][1:] == pytest.approx(losses[1][1:], abs=1e-4)
    for name in ("", "seed-1"):
        assert_same_losses(tmp_path / "one" / name, tmp_path / "two" / name)
