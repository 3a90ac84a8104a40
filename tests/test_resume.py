"""A run that is interrupted and resumed ends in the same bits as one that was not."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    MODES,
    QUICK,
    ROOT,
    assert_same_run,
    assert_same_tensors,
    evaluate,
    files,
    interrupt,
    json_of,
    metrics,
    progress,
    scores,
    step_losses,
    tensors,
    train,
    trained,
    write_pairs,
)

import train as train_script
from minift.files import checkpoint
from minift.run import folder as run

# 24 rows in batches of 3, two a step: 4 steps an epoch, validation after every third
SHORT = "--steps 11 --batch 3 --accumulate 2 --eval-every 3 --lr 3e-3 --model-dropout 0.1".split()

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", str(model_folder), "--data", str(pairs), *QUICK, *SHORT]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_bit_identical(
    common: list[str], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 5 (in the middle of epoch 2 and between two validations), and again at step 10."""
    options = ["--mode", mode, *(["--dropout", "0.2"] if mode == "lora" else [])]
    trained(*common, *options, "--out", tmp_path / "whole")
    interrupt(monkeypatch, (5, 10))
    for step, arguments in (
        (5, [*common, *options, "--out", tmp_path / "x"]),
        (10, ["--resume", tmp_path / "x"]),
    ):
        ended = train(*arguments)
        assert ended.code == 143 and not ended.err
        line = f"stopped after step {step}; python train.py --resume {tmp_path / 'x'} continues from there\n"
        assert ended.out.endswith(line)
        assert progress(tmp_path / "x")["step"] == step and not (tmp_path / "x" / "result.json").exists()
    torch.manual_seed(99)  # whatever the random state is, a step seeds its own
    trained("--resume", tmp_path / "x")
    assert_same_run(tmp_path / "whole", tmp_path / "x")
    assert set(files(tmp_path / "whole")) == set(files(tmp_path / "x"))
    monkeypatch.undo()
    no_dropout = ["--model-dropout", 0, "--dropout" if mode == "lora" else "--seed", 0]
    trained(*common, *options, *no_dropout, "--out", tmp_path / "without")
    assert step_losses(tmp_path / "without") != step_losses(tmp_path / "whole")  # dropout was on


def test_resuming_a_finished_run_changes_nothing(common: list[str], tmp_path: Path) -> None:
    trained(*common, "--mode", "lora", "--out", tmp_path / "x")
    before = {name: (tmp_path / "x" / name).read_bytes() for name in ("metrics.jsonl", "config.json")}
    kept, numbers = scores(tmp_path / "x"), tensors(tmp_path / "x" / "tuned.safetensors")
    trained("--resume", tmp_path / "x")
    assert scores(tmp_path / "x") == kept
    assert all(torch.equal(t, numbers[n]) for n, t in tensors(tmp_path / "x" / "tuned.safetensors").items())
    assert {name: (tmp_path / "x" / name).read_bytes() for name in before} == before


def test_early_stopping_counts_across_an_interruption(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "few", rows=3, seed=1)
    options = "--mode full --steps 200 --eval-every 3 --patience 3 --batch 3 --accumulate 1 --model-dropout 0"
    arguments = [*common, *options.split(), "--schedule", "constant", "--data", pairs]
    trained(*arguments, "--out", tmp_path / "whole")
    result = scores(tmp_path / "whole")
    assert result["stopped_early"] and result["best_step"] < result["steps"] - 6
    interrupt(monkeypatch, (result["best_step"] + 5,))  # one validation without a better loss behind it
    assert train(*arguments, "--out", tmp_path / "x").code == 143
    assert progress(tmp_path / "x")["evals_since_best"] == 1
    trained("--resume", tmp_path / "x")
    assert_same_run(tmp_path / "whole", tmp_path / "x")


def test_a_comparison_is_resumed_as_one(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(*common, "--mode", "prompt,lora,full", "--out", tmp_path / "whole")
    interrupt(monkeypatch, (11 + 7,))
    ended = train(*common, "--mode", "prompt,lora,full", "--out", tmp_path / "x")
    assert ended.code == 143 and f"--resume {tmp_path / 'x'} continues from there" in ended.out
    assert not (tmp_path / "x" / "full" / "result.json").exists()
    part = train("--resume", tmp_path / "x" / "lora")
    assert part.code == 2 and f"--resume {tmp_path / 'x'} continues all of it" in part.err
    finished = (tmp_path / "x" / "prompt" / "result.json").read_bytes()
    out = trained("--resume", tmp_path / "x")
    assert (tmp_path / "x" / "prompt" / "result.json").read_bytes() == finished  # not run again
    assert "| prompt" in out and "| full" in out
    for mode in ("prompt", "lora", "full"):
        assert_same_run(tmp_path / "whole" / mode, tmp_path / "x" / mode)
    compared = [json_of(tmp_path / folder / "compare.json") for folder in ("whole", "x")]
    assert [result["test_loss"] for result in compared[0]] == [result["test_loss"] for result in compared[1]]
    (tmp_path / "x" / "lora" / "result.json").write_text('{"seeds": [0]}')  # damaged, so it is made again
    trained("--resume", tmp_path / "x")
    assert json_of(tmp_path / "x" / "compare.json")[0]["test_loss"] == compared[1][0]["test_loss"]


@pytest.mark.parametrize("mode", MODES)
def test_sigkill_at_any_moment_loses_nothing(common: list[str], tmp_path: Path, mode: str) -> None:
    """6 moments for each mode: after seeded delays, and before, after or half-way through writes."""
    first = 6 * list(MODES).index(mode)
    arguments = [str(tmp_path), str(first), "6", *common, "--mode", mode, "--steps", "7"]
    kill = [sys.executable, str(ROOT / "tests" / "kill_moments.py"), *arguments]
    single = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(kill, text=True, capture_output=True, timeout=300, env=single)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 7, done.stderr
    whole, *survived = lines
    assert whole["code"] == 0
    for moment in survived:
        assert moment["code"] == 0, moment
        assert (moment["hash"], moment["files"]) == (whole["hash"], whole["files"]), moment
    killed = [m for moment in survived for m, code in moment["moments"] if code == -signal.SIGKILL]
    assert len(killed) >= 5 and any("last" in m for m in killed) and any("delay" in m for m in killed)


SLOW_STEP = """
train_step = train.train_step
def step(model, *others):
    result = train_step(model, *others)
    print("sleeping", flush=True)
    time.sleep(60)
    return result
train.train_step = step
"""
SLOW_READING = """
def load(*arguments):
    print("sleeping", flush=True)
    time.sleep(60)
train.dataset.load_examples = load
"""


def start(arguments: list[Any], tmp_path: Path, code: str = "") -> subprocess.Popen:
    """train.py in a process of its own, with some code run in it before."""
    before = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without it
sys.path.insert(0, {str(ROOT)!r})
import train
from minift.errors import run_script
train.plan.predict = lambda *_: {{"predicted_peak_bytes": 0}}
{code}
run_script(train.main)
"""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    run_it = [sys.executable, "-c", before, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(run_it, cwd=tmp_path, text=True, env=alone, **pipes)


def wait_for_steps(folder: Path, process: subprocess.Popen, steps: int) -> None:
    log, end = folder / "metrics.jsonl", time.monotonic() + 90
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_saves_and_says_how_to_resume(
    common: list[str], tmp_path: Path, number: int, code: int
) -> None:
    folder = tmp_path / "x"
    arguments = [*common, "--mode", "prompt", "--steps", 100_000, "--eval-every", 100_000, "--out", folder]
    process = start(arguments, tmp_path)
    wait_for_steps(folder, process, 5)  # the lines of step 0 and of four steps
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err == ""
    step = progress(folder)["step"]
    assert step >= 4 and len(step_losses(folder)) == step
    assert f"stopped after step {step}; python train.py --resume {folder} continues from there" in out
    assert not (folder / "result.json").exists()


def test_the_second_signal_ends_at_once(common: list[str], tmp_path: Path) -> None:
    """While a step sleeps for a minute, the first signal waits for it, and the second does not."""
    folder = tmp_path / "x"
    process = start([*common, "--mode", "prompt", "--out", folder], tmp_path, SLOW_STEP)
    while process.stdout.readline() not in ("sleeping\n", ""):
        pass
    before = (folder / "last.safetensors").read_bytes()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "stopped after" not in out
    assert (folder / "last.safetensors").read_bytes() == before


def test_ctrl_c_before_training_leaves_nothing(common: list[str], tmp_path: Path) -> None:
    """It arrives while the data are read: no traceback, exit code 130, no folder."""
    process = start([*common, "--out", tmp_path / "x"], tmp_path, SLOW_READING)
    while process.stdout.readline() not in ("sleeping\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "interrupted\n" and not (tmp_path / "x").exists()


def test_a_folder_in_use_is_refused(common: list[str], tmp_path: Path) -> None:
    trained(*common, "--mode", "prompt", "--out", tmp_path / "x")
    before = {name: (tmp_path / "x" / name).read_bytes() for name in files(tmp_path / "x")}
    with open(tmp_path / "x" / "lock") as held:
        run.lock(held, tmp_path / "x")
        for arguments in ([*common, "--out", tmp_path / "x", "--overwrite"], ["--resume", tmp_path / "x"]):
            ended = train(*arguments)
            assert ended.code == 2 and "in use by another run" in ended.err and ended.err.count("\n") == 1
    assert {name: (tmp_path / "x" / name).read_bytes() for name in files(tmp_path / "x")} == before
    assert evaluate(tmp_path / "x", "--prompt", "a", "--max-new-tokens", 1).code == 0  # reading is no harm


def test_overwriting_needs_its_flag(common: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    trained(*common, "--mode", "lora", "--out", folder)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    ended = train(*common, "--mode", "full", "--out", folder)
    assert ended.code == 2 and "--overwrite" in ended.err and "--out" in ended.err
    ended = train(*common, "--mode", "lora", "--targets", "nonsense", "--out", folder, "--overwrite")
    assert ended.code == 2  # and a run that cannot begin overwrites nothing
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    trained(*common, "--mode", "full", "--out", folder, "--overwrite", "--steps", 2)
    assert json_of(folder / "result.json")["mode"] == "full" and len(step_losses(folder)) == 2
    trained(*common, "--mode", "lora,prompt", "--out", folder, "--overwrite", "--steps", 1)
    assert not (folder / "result.json").exists() and (folder / "lora" / "result.json").exists()
    trained(*common, "--mode", "lora", "--out", folder, "--overwrite", "--steps", 1)
    assert not (folder / "prompt").exists() and not (folder / "compare.json").exists()


def test_other_folders_are_never_overwritten(common: list[str], tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = {name: (model_folder / name).read_bytes() for name in files(model_folder)}
    for folder in (tmp_path / "mine", model_folder):
        for more in ([], ["--overwrite"]):
            ended = train(*common, "--out", folder, *more)
            assert ended.code == 2 and str(folder) in ended.err
    assert list(files(tmp_path / "mine")) == ["thesis.txt"]
    assert {name: (model_folder / name).read_bytes() for name in files(model_folder)} == before


def test_a_run_killed_before_it_began_can_begin_again(common: list[str], tmp_path: Path) -> None:
    """A lock and half a config.json are not a run that anybody could lose."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "lock").write_text("")
    (tmp_path / "x" / ".config.json.tmp").write_text("{")
    trained(*common, "--mode", "prompt", "--steps", 1, "--out", tmp_path / "x")
    assert ".config.json.tmp" not in set(files(tmp_path / "x"))


def edit_last(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the progress in last.safetensors."""
    values, metadata = checkpoint.read(folder / checkpoint.LAST)
    state = json.loads(metadata["progress"])
    change(state)
    checkpoint.write(folder / checkpoint.LAST, values, metadata | {"progress": json.dumps(state)})


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_of_the_version_before_resumes(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Its progress and its log know of no step 0; the first validation is the first candidate."""
    trained(*common, "--mode", "lora", "--out", tmp_path / "whole")
    interrupt(monkeypatch, (stop,))
    assert train(*common, "--mode", "lora", "--out", tmp_path / "x").code == 143
    edit_last(tmp_path / "x", lambda state: state.pop("best_after_start"))
    if stop < 3:  # before the first validation
        edit_last(tmp_path / "x", lambda state: state.update(best_val_loss=math.inf))
        (tmp_path / "x" / "tuned.safetensors").unlink()
    log = (tmp_path / "x" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x" / "metrics.jsonl").write_text("".join(log[1:]))
    raw = json_of(tmp_path / "x" / "config.json")
    del raw["train"]["eos"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(raw))
    trained("--resume", tmp_path / "x")
    assert_same_tensors(tmp_path / "whole", tmp_path / "x")
    assert metrics(tmp_path / "whole")[1:] == metrics(tmp_path / "x")
    assert progress(tmp_path / "whole") == progress(tmp_path / "x")


def assert_same_but_size(one: Path, other: Path) -> None:
    """Bit for bit; the files of an extended run have other options in their metadata."""
    assert_same_tensors(one, other)
    assert metrics(one) == metrics(other) and progress(one) == progress(other)
    assert scores(one) | {"tuned_bytes": 0} == scores(other) | {"tuned_bytes": 0}


def test_a_run_continues_beyond_its_end(common: list[str], tmp_path: Path) -> None:
    """At a constant learning rate, 4 steps and 4 more are the 8 steps of one run, optimizer and all."""
    options = "--mode lora --dropout 0.2 --schedule constant --warmup-ratio 0 --eval-every 2".split()
    trained(*common, *options, "--steps", 8, "--out", tmp_path / "whole")
    trained(*common, *options, "--steps", 4, "--out", tmp_path / "x")
    said = trained("--resume", tmp_path / "x")
    assert "this run has ended" in said and "--steps above 4" in said and f"--resume {tmp_path / 'x'}" in said
    before = {name: (tmp_path / "x" / name).read_bytes() for name in files(tmp_path / "x")}
    ended = train("--resume", tmp_path / "x", "--steps", 3)
    assert ended.code == 2 and "has done 4 steps already" in ended.err and ended.err.count("\n") == 1
    assert {name: (tmp_path / "x" / name).read_bytes() for name in files(tmp_path / "x")} == before
    ended = train("--resume", tmp_path / "x", "--steps", 8, "--lr", 1)
    assert ended.code == 2 and "leave out --lr" in ended.err
    said = trained("--resume", tmp_path / "x", "--epochs", 2)  # 4 steps an epoch; --steps 4 no longer counts
    assert "lora: continues after step 4, up to step 8; the constant schedule covers all 8 steps" in said
    assert_same_but_size(tmp_path / "whole", tmp_path / "x")
    raw = json_of(tmp_path / "x" / "config.json")
    assert raw["train"]["epochs"] == 2 and raw["train"]["steps"] is None
    assert raw["origins"]["epochs"] == [2, "--resume"]


def test_the_schedule_covers_the_new_length(common: list[str], tmp_path: Path) -> None:
    trained(*common, "--mode", "lora", "--schedule", "cosine", "--steps", 4, "--out", tmp_path / "x")
    trained("--resume", tmp_path / "x", "--steps", 10)
    rates = [line["lr"] for line in metrics(tmp_path / "x") if "lr" in line]
    cosine = [3e-3 * math.cos(math.pi * (step - 1) / 9 / 2) ** 2 for step in range(4, 10)]  # one step of warm-up
    assert rates[4:] == pytest.approx(cosine, rel=1e-9) and rates[4] > rates[3]


def test_an_interrupted_extension_resumes(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new length is in the run's folder, and is not given again; the files from before fit it."""
    options = "--mode full --schedule constant --warmup-ratio 0 --eval-every 2".split()
    trained(*common, *options, "--steps", 8, "--out", tmp_path / "whole")
    trained(*common, *options, "--steps", 4, "--out", tmp_path / "x")
    interrupt(monkeypatch, (3,))
    assert train("--resume", tmp_path / "x", "--steps", 8).code == 143
    assert not (tmp_path / "x" / "result.json").exists()
    trained("--resume", tmp_path / "x")
    assert_same_but_size(tmp_path / "whole", tmp_path / "x")


def test_an_early_stopped_run_continues_with_more_patience(common: list[str], tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "few", rows=3, seed=1)
    options = "--mode full --steps 200 --eval-every 3 --batch 3 --accumulate 1 --model-dropout 0"
    arguments = [*common, *options.split(), "--schedule", "constant", "--data", pairs]
    trained(*arguments, "--patience", 4, "--out", tmp_path / "whole")
    trained(*arguments, "--patience", 2, "--out", tmp_path / "x")
    assert scores(tmp_path / "x")["stopped_early"] and scores(tmp_path / "whole")["stopped_early"]
    done = scores(tmp_path / "x")["steps"]
    said = trained("--resume", tmp_path / "x")
    assert "this run has ended" in said and "--patience above 2" in said
    trained("--resume", tmp_path / "x", "--patience", 4)
    assert scores(tmp_path / "whole")["steps"] > done
    assert_same_but_size(tmp_path / "whole", tmp_path / "x")
    trained("--resume", tmp_path / "x", "--steps", 201)  # more steps count validations anew
    assert scores(tmp_path / "x")["steps"] > scores(tmp_path / "whole")["steps"]


def test_a_comparison_continues_with_each_of_its_runs(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--mode lora,full --schedule constant --warmup-ratio 0 --eval-every 2".split()
    trained(*common, *options, "--steps", 6, "--out", tmp_path / "whole")
    trained(*common, *options, "--steps", 4, "--out", tmp_path / "x")
    assert trained("--resume", tmp_path / "x").count("this run has ended") == 2
    interrupt(monkeypatch, (3,))  # in the first step of the second run
    assert train("--resume", tmp_path / "x", "--steps", 6).code == 143
    trained("--resume", tmp_path / "x")
    for mode in ("lora", "full"):
        assert_same_but_size(tmp_path / "whole" / mode, tmp_path / "x" / mode)
    compared = [json_of(tmp_path / folder / "compare.json") for folder in ("whole", "x")]
    assert [result["test_loss"] for result in compared[0]] == [result["test_loss"] for result in compared[1]]


def test_a_refused_extension_changes_nothing(common: list[str], tmp_path: Path) -> None:
    folder, pairs = tmp_path / "x", write_pairs(tmp_path / "pairs")
    trained(*common, "--data", pairs, "--steps", 4, "--out", folder)

    def refused(reason: str) -> None:
        before = {name: (folder / name).read_bytes() for name in files(folder)}
        ended = train("--resume", folder, "--steps", 8)
        assert ended.code == 2 and reason in ended.err and ended.err.count("\n") == 1, ended.err
        assert {name: (folder / name).read_bytes() for name in files(folder)} == before

    lines = (pairs / "train.jsonl").read_text()
    (pairs / "train.jsonl").write_text(lines.partition("\n")[2])
    refused("other training or validation rows")
    (pairs / "train.jsonl").write_text(lines)
    log = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("garbage\n" + log)
    refused("metrics.jsonl:1 cannot be read")
    (folder / "metrics.jsonl").write_text(log)
    trained("--resume", folder, "--steps", 8)


def test_an_input_in_the_folder_is_not_overwritten(common: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    trained(*common, "--steps", 1, "--out", folder)
    inside = write_pairs(folder / "pairs")
    ended = train(*common, "--data", inside, "--steps", 1, "--out", folder, "--overwrite")
    assert ended.code == 2 and f"--data {inside} is in --out {folder}" in ended.err and ended.err.count("\n") == 1
    assert (inside / "train.jsonl").exists() and (folder / "result.json").exists()


@pytest.mark.parametrize("name", ["validate", "save_last"])
def test_a_signal_at_the_last_step_ends_the_run(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """While it validates or saves, after all steps: the scores are left for --resume."""
    where = train_script if name == "validate" else checkpoint
    original = getattr(where, name)

    def call(*arguments: Any) -> Any:
        if arguments[-1].step == 4:  # the progress
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, call)
        ended = train(*common, "--steps", 4, "--out", tmp_path / "x")
    assert ended.code == 143 and "stopped after step 4" in ended.out and not (tmp_path / "x" / "result.json").exists()
    trained("--resume", tmp_path / "x")
    trained(*common, "--steps", 4, "--out", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "x")
