"""python -m minift.bench gpu: the correctness and the speed of everything on a GPU, in half an hour.

Correctness of every kernel and mode on the device, the table of the kernels and the rule of --kernel auto, training of
every mode at four sizes beside transformers and PEFT, and decoding: in this order, the most important first. Each stage
has a part of the time that is left, and what does not fit is listed as not measured. report.md and report.json in --out
are written after every line, so it can be stopped at any time (Ctrl-C, SIGTERM). The last lines are a table for the
README. --dry walks through all of it on a CPU, with tiny shapes, in less than a minute; its figures mean nothing.

Each stage runs in a process of its own: a kernel that hangs, or that makes the GPU unusable for its process, costs one
measurement.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from minift.bench.command import read_options
from minift.bench.gpu_context import Context
from minift.bench.gpu_stages import STAGES, Stage
from minift.bench.report import DRY, Report
from minift.bench.targets import TARGET_COLUMNS, readme_lines, targets
from minift.device import configure_process
from minift.errors import UserError
from minift.options import option
from minift.report.table import table
from minift.run.folder import StopSignals

POLL_SECONDS = 0.1  # between two looks at the signals
NO_TIME = "no time left"
Message = tuple[str, Any]  # "result" and its values, "failed" or "lost" and the reason, "done"
WhyStop = Callable[[], str | None]  # the reason to stop now, or None


@dataclass(frozen=True)
class GpuOptions:
    minutes: float = option(28.0, "the time for all stages", above=0)
    out: str = option("gpu-report", "folder of the report; an earlier report there is replaced")
    stages: str = option(",".join(stage.name for stage in STAGES), "the stages to run")
    dry: bool = option(False, "walk through all stages on a CPU, with tiny shapes")


def bench_gpu(arguments: list[str]) -> None:
    options = read_options("gpu", __doc__, GpuOptions, arguments)
    stages = parse_stages(options.stages)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # the kernels run in Triton's interpreter
        print(DRY)
    elif not torch.cuda.is_available():
        raise UserError("there is no GPU here: --dry walks through all stages on a CPU, with tiny shapes")
    folder = Path(options.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created: {error.strerror}; name another folder") from None
    report = Report(folder, options.dry, {stage.name: stage.title for stage in stages})
    with StopSignals() as signals:
        run_stages(stages, options, report, signals)
        print(f"\n{table(targets(report.results), TARGET_COLUMNS)}\n")
        print("\n".join(readme_lines(report.results)))
        print(f"\nthe report: {folder / 'report.md'} and {folder / 'report.json'}")
    if signals.received:
        print(f"{stop_reason(signals)}: all that was measured until then is in the report", file=sys.stderr)
        sys.exit(128 + signals.received)


def parse_stages(text: str) -> list[Stage]:
    """The stages of a comma list, in their order, and that of the machine, whose rates the others need. Raises
    UserError."""
    chosen, names = text.split(","), [stage.name for stage in STAGES]
    if others := sorted(set(chosen) - set(names)):
        raise UserError(f"--stages {text}: there is no {', '.join(others)}; there are {', '.join(names)}")
    return [stage for stage in STAGES if stage.name in ("machine", *chosen)]


def stop_reason(signals: StopSignals) -> str:
    return f"stopped by {signal.Signals(signals.received).name}"


# ---- the process that leads; it computes nothing

def run_stages(stages: list[Stage], options: GpuOptions, report: Report, signals: StopSignals) -> None:
    end = time.monotonic() + 60 * options.minutes
    for number, stage in enumerate(stages):
        print(f"\n## {stage.title}", flush=True)
        units, started = list(stage.units(options.dry)), time.monotonic()
        share = stage.weight / sum(later.weight for later in stages[number:])
        deadline = started + share * (end - started)

        def why_stop(deadline: float = deadline) -> str | None:
            if signals.received:
                return stop_reason(signals)
            return NO_TIME if time.monotonic() > deadline else None

        context = Context(options.dry, report.folder, tuple(report.results))
        first, reason = 0, why_stop()
        while first < len(units) and reason is None:
            first, reason = run_worker(stage, units, first, context, report, why_stop)
        if first < len(units):
            report.add_not_measured(stage.name, units[first:], reason)
        report.sections[stage.name].seconds = time.monotonic() - started
        report.write()


def run_worker(stage: Stage, units: list[str], first: int, context: Context, report: Report, why_stop: WhyStop
               ) -> tuple[int, str | None]:
    """Measure the units from number `first` on, in one process. Returns the number of the first unit that is left, and
    the reason to stop; None: the rest can continue in another process."""
    number = first
    with worker(stage, first, context) as receiver:
        while number < len(units):
            kind, value = next_message(receiver, stage.silence, why_stop)
            if kind == "result":
                report.add(stage.name, value)
            elif kind == "failed":
                report.add_failure(stage.name, units[number], value)
            elif kind == "done":
                number += 1
            elif kind == "stop":
                return number, value
            else:  # "lost": the process has died, hangs, or cannot use the GPU any more
                if value:
                    report.add_failure(stage.name, units[number], value)
                return number + 1, None
    return number, None


@contextlib.contextmanager
def worker(stage: Stage, first: int, context: Context) -> Iterator[Connection]:
    """While entered, a process measures the units of a stage from number `first` on. Gives the end of a pipe at which
    its messages arrive."""
    # A new process imports torch, which takes seconds. A dry run forks a server that has imported it already; with a
    # GPU that would fail if any import in the server had asked for the GPU.
    methods = multiprocessing.get_context("forkserver" if context.dry else "spawn")
    methods.set_forkserver_preload([__name__, "torch._dynamo"])  # every optimizer imports the second, for seconds
    receiver, sender = methods.Pipe(duplex=False)
    process = methods.Process(target=measure_units, args=(stage.name, first, context, sender))
    process.start()
    sender.close()
    try:
        yield receiver
    finally:
        receiver.close()
        if process.is_alive():  # all that it has sent is read, or is not wanted any more
            with contextlib.suppress(ProcessLookupError):  # it has ended now, or not begun
                os.killpg(process.pid, signal.SIGKILL)  # with the programs that it has started
            process.kill()
        process.join()


def next_message(receiver: Connection, silence: float, why_stop: WhyStop) -> Message:
    """The next message of a worker, "stop" and the reason, or "lost" and the reason."""
    silent_until = time.monotonic() + silence
    while True:
        if reason := why_stop():
            return "stop", reason
        try:
            if receiver.poll(POLL_SECONDS):
                return receiver.recv()
        except (EOFError, OSError):
            return "lost", "its process died"
        if time.monotonic() > silent_until:
            return "lost", f"no result for {silence:.0f} seconds"


# ---- the process that measures

def measure_units(name: str, first: int, context: Context, sender: Connection) -> None:
    """Measure the units of a stage from number `first` on, and send each result. What libraries print goes into
    log.txt."""
    os.setsid()  # Ctrl-C in a terminal reaches the leading process alone, which ends this one and its programs
    log = os.open(context.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    configure_process()
    stage = next(stage for stage in STAGES if stage.name == name)
    for unit in list(stage.units(context.dry).values())[first:]:
        try:
            for result in stage.run(unit, context):
                sender.send(("result", result))
        except Exception as error:
            traceback.print_exc()
            sender.send(("failed", describe(error)))
        if not free_memory(context.device):
            sender.send(("lost", None))
            return
        sender.send(("done", None))


def describe(error: Exception) -> str:
    """An error as one line; CUDA's have several, with general advice."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name}{first_line[:300]}"


def free_memory(device: torch.device) -> bool:
    """Give memory back between two units. False if the GPU can no longer be used by this process: after a fault such as
    an illegal memory access, every call fails."""
    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
