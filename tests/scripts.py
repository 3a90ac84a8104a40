"""Running train.py and eval.py as their users do, in this process or in one of their own, on tiny shapes."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import eval as eval_script
import train as train_script
from minift import plan
from minift.errors import run_script
from minift.files import safetensors

ROOT = Path(__file__).resolve().parent.parent


class SmallMode(NamedTuple):
    """A mode's options for a tiny model, and a learning rate at which that learns in a few steps."""

    options: dict[str, Any]
    lr: float


# the one list of modes for all tests; test_modes.py holds it against the registry
MODES = {
    "full": SmallMode({}, 3e-3),
    "selective": SmallMode({"train": "top:1,norm"}, 1e-2),
    "lora": SmallMode({"rank": 2, "alpha": 5.0, "targets": "q,v"}, 3e-2),
    "prompt": SmallMode({"prompt_tokens": 3}, 1e-1),
    "adapter": SmallMode({"bottleneck": 5}, 3e-2),
}
WORDS = "fridge broken landlord lunch meeting late cheap food golden palace price italian name tab".split()
QUICK = ("--dtype", "fp32", "--device", "cpu", "--batch", "4", "--max-new-tokens", "6", "--test-rows", "6",
         "--val-rows", "6")  # fmt: skip


@contextlib.contextmanager
def one_thread(predict: bool) -> Iterator[None]:
    """For shapes so small a second thread only waits for the first. To predict a run's memory takes longer
    than such a run, so it is left out unless asked for."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if not predict:
            none = mock.patch.object(plan, "predict", lambda *_: {"predicted_peak_bytes": 0})
            stack.enter_context(none)
        yield
    torch.set_num_threads(2)


class Ended(NamedTuple):
    """How a script ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def run(main: Any, *arguments: Any) -> Ended:
    """`python train.py ARGUMENTS`, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", ["script.py", *map(str, arguments)]):
            try:
                run_script(main)
                code = 0
            except SystemExit as ended:
                code = ended.code
    return Ended(code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


def train(*arguments: Any) -> Ended:
    return run(train_script.main, *arguments)


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
            **env: str) -> Ended:  # fmt: skip
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
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def files(folder: Path) -> Iterator[str]:
    """Everything in a folder, by relative path."""
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
