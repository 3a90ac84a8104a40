"""Running train.py and eval.py as their users do, in this process or in one of their own, on tiny shapes."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import eval as eval_script
import train as train_script
from minift import ops, plan, training
from minift.errors import run_script
from minift.files import safetensors
from minift.report import plot
from minift.training import StepResult

ROOT = Path(__file__).resolve().parent.parent


class SmallMode(NamedTuple):
    """A mode's options for a tiny model, and a learning rate at which that learns in a few steps."""

    options: dict[str, Any]
    lr: float


# the one list of modes for all tests; test_modes.py holds it against the registry
MODES = {
    "full": SmallMode({}, 3e-3),
    "selective": SmallMode({"train": "top:1,norm"}, 1e-2),
    "lora": SmallMode({"rank": 2, "alpha": 5.0, "targets": "q,v"}, 1e-2),
    "prompt": SmallMode({"prompt_tokens": 3}, 1.0),
    "adapter": SmallMode({"bottleneck": 5}, 1e-2),
}
WORDS = "fridge broken landlord lunch meeting late cheap food golden palace price italian name tab".split()
QUICK = ("--dtype", "fp32", "--device", "cpu", "--batch", "4", "--max-new-tokens", "6", "--test-rows", "6",
         "--val-rows", "6")


@contextlib.contextmanager
def one_thread(predict: bool) -> Iterator[None]:
    """On shapes this small a second thread only waits. To predict a run's memory, or to draw pictures, takes longer
    than such a run, so both are left out unless asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if not predict:
            stack.enter_context(mock.patch.object(plan, "predict", lambda *_: {"predicted_peak_bytes": 0}))
            stack.enter_context(mock.patch.object(plot, "draw_curves", lambda folder: None))
            stack.enter_context(mock.patch.object(plot, "draw_runs", lambda *_: None))
        yield
    torch.set_num_threads(before)


class Ended(NamedTuple):
    """How a script ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def run(main: Any, *arguments: Any) -> Ended:
    """`python train.py ARGUMENTS`, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.object(sys, "argv", ["script.py", *map(str, arguments)]))
        stack.enter_context(mock.patch.object(ops, "plain", False))  # --ops plain is for this run alone
        try:
            run_script(main)
            code = 0
        except SystemExit as ended:
            code = ended.code
    return Ended(code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


def train(*arguments: Any) -> Ended:
    return run(train_script.main, *arguments)


def interrupt(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of these steps, counted over all runs of a test."""
    train_step, count = train_script.train_step, iter(range(1, 10_000))

    def step(*arguments: Any) -> StepResult:
        if next(count) in steps:
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    monkeypatch.setattr(train_script, "train_step", step)


def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU read the loss of a step after the next one has begun, as for a GPU."""
    monkeypatch.setattr(training, "reads_late", lambda device: True)


def evaluate(*arguments: Any) -> Ended:
    return run(eval_script.main, *arguments)


def trained(*arguments: Any) -> str:
    """What a run that must succeed printed."""
    ended = train(*arguments)
    assert ended.code == 0, ended.err
    return ended.out


def command(script: str, *arguments: Any) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def process(script: str, *arguments: Any, cwd: Path, text: str | None = None, timeout: int = 120,
            **env: str) -> Ended:
    """The script in a process of its own."""
    done = subprocess.run(
        command(script, *arguments),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        input=text,
        text=True,
        capture_output=True,
        timeout=timeout,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def write_pairs(folder: Path, rows: int = 24, seed: int = 0) -> Path:
    """A folder of pairs to learn: the completion repeats the prompt's last word. Rows are ragged."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for split, count in (("train", rows), ("val", 6), ("test", 6)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number in range(count):
                words = rng.choices(WORDS, k=rng.randint(1, 6)) + [rng.choice(WORDS[:4])]
                prompt = f"{number}: {' '.join(words)} ="
                file.write(json.dumps({"prompt": prompt, "completion": words[-1]}) + "\n")
    return folder


def tensors(path: Path) -> dict[str, Any]:
    return safetensors.read(path)[0]


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the durations, which differ from one run to the next."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def step_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


TIMES = ("seconds", "tokens_per_second", "steady_tokens_per_second", "peak_memory_bytes", "predicted_peak_bytes")


def scores(folder: Path) -> dict[str, Any]:
    """result.json without what differs from one run to the next."""
    return {name: value for name, value in json_of(folder / "result.json").items() if name not in TIMES}


def progress(folder: Path) -> dict[str, Any]:
    """Without what differs from one run to the next."""
    found = json.loads(safetensors.read(folder / "last.safetensors")[1]["progress"])
    return found | {"seconds": 0, "peak_memory_bytes": 0}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Both tensor files of two runs, bit for bit."""
    for name in ("tuned.safetensors", "last.safetensors"):
        a, b = tensors(one / name), tensors(other / name)
        assert a.keys() == b.keys(), name
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"


def assert_same_run(one: Path, other: Path) -> None:
    """Tensors, log, scores and progress of two runs, bit for bit."""
    assert_same_tensors(one, other)
    assert metrics(one) == metrics(other)
    assert scores(one) == scores(other)
    assert progress(one) == progress(other)


def files(folder: Path) -> Iterator[str]:
    """Everything in a folder, by relative path."""
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
