"""Kill training with SIGKILL at seeded moments and resume it; a process of its own, for test_resume.py.

    python kill_moments.py FOLDER FIRST COUNT ARGUMENTS-OF-TRAIN...

prints a JSON line for each moment: what was killed where, and the hash of the run that was resumed. The first
line is the run that nothing interrupted. Children are forked, so that torch is imported once.
"""

import builtins
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402

import train  # noqa: E402
from minift import errors  # noqa: E402
from minift.files import atomic, safetensors  # noqa: E402
from minift.report import plot  # noqa: E402

CALLS = ("replace", "fsync", "rename", "unlink")  # of os; and every `write` of files that are written atomically


def run_hash(folder: Path) -> str:
    """Of the tensors, the metrics but for times, and the scores."""
    digest = hashlib.sha256()
    for name in ("tuned.safetensors", "last.safetensors"):
        for key, tensor in sorted(safetensors.read(folder / name)[0].items()):
            digest.update(key.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    digest.update(json.dumps([line | {"seconds": 0} for line in lines]).encode())
    result = json.loads((folder / "result.json").read_text())
    scores = ("steps", "best_step", "train_loss", "best_val_loss", "test_loss", "rougeL", "exact_match")
    digest.update(json.dumps([result[name] for name in scores]).encode())
    return digest.hexdigest()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Counts the calls that write; kills the process at call `last`, before it, or half-way through it."""

    def __init__(self, last: int, half: bool):
        self.calls, self.last, self.half = 0, last, half

    def wrap(self, function: Callable) -> Callable:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self.last and not self.half:
                die()
            result = function(*arguments, **named)
            if self.calls == self.last:
                die()
            return result

        return counted

    def open(self, *arguments: Any, **named: Any) -> Any:
        """A file whose writes are counted, and of whose last one half reaches the disk."""
        file = builtins.open(*arguments, **named)
        if "w" not in "".join(map(str, arguments[1:])):
            return file
        write = file.write

        def torn(data: Any) -> int:
            self.calls += 1
            if self.calls == self.last:
                write(bytes(data)[: len(bytes(data)) // 2] if self.half else b"")
                file.flush()
                die()
            return write(data)

        wrapper = type(
            "Torn", (), {"write": staticmethod(torn), "__getattr__": lambda _, n: getattr(file, n)}
        )()
        type(wrapper).__enter__ = lambda _: wrapper
        type(wrapper).__exit__ = lambda _, *exception: file.close()
        return wrapper


def child(log: Path, arguments: list[str], last: int = 0, half: bool = False, delay: float = 0.0) -> int:
    """Run train.py in a fork, killed at a call or after a delay if asked; its exit code, -9 if killed."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        counter = Counter(last, half)
        for name in CALLS:
            setattr(os, name, counter.wrap(getattr(os, name)))
        atomic.open = counter.open
        if delay:
            threading.Timer(delay, die).start()
        sys.argv = ["train.py", *arguments]
        try:
            errors.run_script(train.main)
            code = 0
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
        os.write(write, str(counter.calls).encode())
        os._exit(code)
    os.close(write)
    _, status = os.waitpid(process, 0)
    child.calls = int(os.read(read, 20) or 0)
    os.close(read)
    return os.waitstatus_to_exitcode(status)


def survive(folder: Path, arguments: list[str], seed: int, calls: int, seconds: float) -> dict[str, Any]:
    """One run, killed once or twice, and resumed until it is done."""
    rng, out, log = random.Random(seed), folder / f"{seed}", folder / f"{seed}.log"
    moments, code = [], None
    command = [*arguments, "--out", str(out)]
    for attempt in range(6):
        moment: dict[str, Any] = {}
        if attempt < 1 + seed % 2:  # every other run is killed again while it resumes
            if seed % 3:
                moment = {"last": rng.randint(1, calls), "half": rng.random() < 0.5}
            else:
                moment = {"delay": rng.uniform(0.01, seconds)}
        code = child(log, command, **moment)
        moments.append([moment, code])
        if code == 0:
            break
        if code != -signal.SIGKILL:
            break
        begun = (out / "config.json").exists()
        command = ["--resume", str(out)] if begun else [*arguments, "--out", str(out)]
    left = sorted(path.name for path in out.iterdir())
    found = run_hash(out) if code == 0 else log.read_text()[-2000:]
    return {"moments": moments, "code": code, "hash": found, "files": left}


def main() -> None:
    torch.set_num_threads(1)
    train.plan.predict = lambda *_: {"predicted_peak_bytes": 0}  # takes longer than the run
    plot.draw_curves = lambda folder: None  # likewise
    folder, first, count, arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    with open(folder / "warm.log", "w") as log, contextlib.redirect_stdout(log):  # what is imported late
        train.main([*arguments, "--steps", "1", "--out", str(folder / "warm")])
    began = time.perf_counter()
    code = child(folder / "whole.log", [*arguments, "--out", str(folder / "whole")])
    seconds, calls = time.perf_counter() - began, child.calls
    files = sorted(path.name for path in (folder / "whole").iterdir())
    print(
        json.dumps({"code": code, "hash": run_hash(folder / "whole"), "files": files, "calls": calls}),
        flush=True,
    )
    for seed in range(first, first + count):
        print(json.dumps(survive(folder, arguments, seed, calls, seconds)), flush=True)


if __name__ == "__main__":
    main()
