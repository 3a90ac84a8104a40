"""Rates beside one other busy program, such as a browser or another run, in turn with rates on a quiet machine."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from minift.openmp import QUIET_SECONDS

BUSY_COLUMNS = {
    "busy_tokens_per_second": ("busy tokens/s", "{:,.0f}".format),
    "busy_share": ("of quiet", "{:.0%}".format),
}
BUSY_WIDTHS = [13, 8]
ROUNDS = 2  # quiet and busy, in turn
SETTLE_SECONDS = 2 * QUIET_SECONDS + 0.5  # until OpenMP's threads wait as the machine then needs


@contextlib.contextmanager
def busy_program() -> Iterator[None]:
    """While entered, a program keeps one core busy. Like a program of another terminal it has a session of its own:
    Linux divides the cores among sessions, so that nice has no effect between them."""
    endless = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # it ends when this process is gone
    program = subprocess.Popen([sys.executable, "-c", endless], start_new_session=True)
    try:
        yield
    finally:
        program.kill()
        program.wait()


def compare_busy(rate: Callable[[], float]) -> dict[str, Any]:
    """The medians of `rate()`, quiet and busy."""
    quiet, busy = [], []
    for _ in range(ROUNDS):
        time.sleep(SETTLE_SECONDS)
        quiet.append(rate())
        with busy_program():
            time.sleep(SETTLE_SECONDS)
            busy.append(rate())
    quiet_rate, busy_rate = statistics.median(quiet), statistics.median(busy)
    return {"quiet_rates": quiet, "busy_rates": busy, "busy_tokens_per_second": busy_rate,
            "busy_share": busy_rate / quiet_rate}
