"""Threads beside other programs: OpenMP's threads wait asleep while another program takes a core.

At the end of each parallel operation the threads wait for the slowest. By spinning, the next operation begins at once,
which is best on a quiet machine. When another program runs on one of the cores, a spinning thread takes the time of
the thread that it waits for, and a step takes several times as long. So a thread of Python compares, once or twice a
second, the cores that other programs take with those that are free. The numbers of a run do not
depend on how threads wait.
"""

import atexit
import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

CPU_TIMES = Path("/proc/stat")  # of Linux
CROWDED = 0.25  # cores that are missing; below, sleeping and waking up costs more than it saves
BUSY_SECONDS, QUIET_SECONDS = 0.5, 1.0  # how long to measure before threads sleep, and before they spin again
crowded = threading.Event()  # other programs take cores that the threads need, so they wait asleep
ended = threading.Event()  # the process ends
PARALLEL_NUMEL = 2**15  # torch gives an elementwise operation one thread for each so many numbers


def busy_seconds(stat: str, cpus: set[int]) -> float:
    """Seconds since the machine started in which these CPUs ran a program, from the text of /proc/stat."""
    ticks = 0
    for line in stat.splitlines():
        name, *times = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            user, nice, system, _, _, irq, softirq = map(int, times[:7])  # without idle and iowait
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK")


def missing_cores(others: float, threads: int, cores: int) -> float:
    """The cores that the threads of this process lack if other programs take `others` of them."""
    return others + threads - cores


def pools_needed(threads: int, cores: int) -> int:
    """How many more pools of threads give OpenMP more threads than cores. A pool's first thread does not count."""
    return (cores - threads) // (threads - 1) + 1


@functools.cache
def adapt_waiting() -> threading.Thread | None:
    """Start to adapt how threads wait, once in a process. Only on Linux, and for several threads."""
    if torch.get_num_threads() == 1 or not CPU_TIMES.exists():
        return None
    thread = threading.Thread(target=watch, args=(torch.get_num_threads(), os.sched_getaffinity(0)), daemon=True)
    thread.start()
    atexit.register(end, thread)  # a thread that Python stops inside OpenMP would end the process with an error
    return thread


def end(thread: threading.Thread) -> None:
    ended.set()
    thread.join()


def watch(threads: int, cpus: set[int]) -> None:
    while not ended.is_set():
        if measure_missing(BUSY_SECONDS, threads, cpus) <= CROWDED:
            continue
        crowded.set()
        with sleeping_waits(threads, len(cpus)):
            while not ended.is_set() and measure_missing(QUIET_SECONDS, threads, cpus) > CROWDED:
                pass
        crowded.clear()


def measure_missing(seconds: float, threads: int, cpus: set[int]) -> float:
    """missing_cores over the next `seconds`."""
    start, busy, own = time.perf_counter(), busy_seconds(CPU_TIMES.read_text(), cpus), time.process_time()
    ended.wait(seconds)
    busy, own = busy_seconds(CPU_TIMES.read_text(), cpus) - busy, time.process_time() - own
    return missing_cores((busy - own) / (time.perf_counter() - start), threads, len(cpus))


@contextlib.contextmanager
def sleeping_waits(threads: int, cores: int) -> Iterator[None]:
    """While entered, the threads of this process wait asleep.

    GNU's OpenMP, which torch's Linux packages bring along, spins 100 times only and then sleeps while the process has
    more threads of OpenMP than cores (gomp_throttled_spin_count_var in its env.c and team.c). Threads of Python that
    have each used OpenMP once, and then do nothing, add their pools of threads to this number until they end.
    """
    count = pools_needed(threads, cores)
    ready, leave = threading.Barrier(count + 1), threading.Event()

    def add_pool() -> None:
        torch.zeros(threads * PARALLEL_NUMEL).add_(1)
        ready.wait()
        leave.wait()

    pools = [threading.Thread(target=add_pool, daemon=True) for _ in range(count)]
    for pool in pools:
        pool.start()
    ready.wait()
    yield
    leave.set()
    for pool in pools:
        pool.join()
