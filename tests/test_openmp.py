"""How OpenMP's threads wait: they sleep beside other programs."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import ROOT

from minift import openmp
from minift.files.checkpoint import Progress
from minift.report.display import Display, TrainingView
from minift.run import config as configuration

STAT = """cpu  900 900 900 900 900 900 900 900 0 0
cpu0 100 20 30 5000 600 7 8 9 0 0
cpu1 200 0 0 5000 0 0 0 50 0 0
cpu10 400 0 0 5000 0 0 0 0 0 0
intr 123 4 5
"""


def test_busy_seconds_counts_programs_on_the_given_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle time, time that waits for a disk and time of the virtual machine's host are no program's."""
    monkeypatch.setattr(openmp.os, "sysconf", lambda name: 100)
    assert openmp.busy_seconds(STAT, {0}) == pytest.approx(1.65)
    assert openmp.busy_seconds(STAT, {0, 1}) == pytest.approx(3.65)
    assert openmp.busy_seconds(STAT, {10}) == pytest.approx(4)


def test_cores_are_missing_only_if_the_threads_need_them() -> None:
    assert openmp.missing_cores(1.0, threads=2, cores=2) > openmp.CROWDED
    assert openmp.missing_cores(1.0, threads=16, cores=16) > openmp.CROWDED
    assert openmp.missing_cores(0.1, threads=2, cores=2) <= openmp.CROWDED
    assert openmp.missing_cores(7.9, threads=8, cores=16) <= openmp.CROWDED  # the other cores have room for them


@pytest.mark.parametrize("threads, cores", [(2, 2), (2, 16), (8, 16), (15, 16), (16, 16), (3, 4)])
def test_so_many_pools_that_openmp_has_more_threads_than_cores(threads: int, cores: int) -> None:
    pools = openmp.pools_needed(threads, cores)
    assert threads + pools * (threads - 1) > cores >= threads + (pools - 1) * (threads - 1)


def test_other_programs_are_those_that_are_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2 seconds the two CPUs were busy for 3 s, of which 1.6 s were this process's: others take 0.7 cores."""
    clocks = {"perf_counter": iter([10.0, 12.0]), "process_time": iter([5.0, 6.6])}
    for name, values in clocks.items():
        monkeypatch.setattr(openmp.time, name, lambda values=values: next(values))
    monkeypatch.setattr(openmp.time, "sleep", lambda seconds: None)
    busy = iter([100.0, 103.0])
    monkeypatch.setattr(openmp, "busy_seconds", lambda text, cpus: next(busy))
    assert openmp.measure_missing(2.0, threads=2, cpus={0, 1}) == pytest.approx(0.7)


class Ended(Exception):
    pass


def test_threads_sleep_from_a_crowded_measurement_to_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = iter([0.0, 0.2, 1.0, 0.9, 0.0, 0.1, 1.0])
    log: list[str] = []

    def measure(seconds: float, threads: int, cpus: set[int]) -> float:
        value = next(missing, None)
        if value is None:
            raise Ended
        if not log or log[-1] == "awake":
            assert not openmp.crowded.is_set()
        log.append(f"{seconds}: {value}")
        return value

    class Waits:
        def __init__(self, threads: int, cores: int):
            assert (threads, cores) == (2, 2)

        def __enter__(self) -> None:
            assert openmp.crowded.is_set()
            log.append("asleep")

        def __exit__(self, *_: object) -> None:
            log.append("awake")

    monkeypatch.setattr(openmp, "crowded", threading.Event())
    monkeypatch.setattr(openmp, "measure_missing", measure)
    monkeypatch.setattr(openmp, "sleeping_waits", Waits)
    with pytest.raises(Ended):
        openmp.watch(2, {0, 1})
    assert log == ["0.5: 0.0", "0.5: 0.2", "0.5: 1.0", "asleep", "1.0: 0.9", "1.0: 0.0", "awake",
                   "0.5: 0.1", "0.5: 1.0", "asleep", "awake"]


POOLS = """
import os, time
from minift import openmp
import torch
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
torch.zeros(2**20).add_(1)  # the main thread's own pool
before = count()
with openmp.sleeping_waits(3, 4):
    print(count() - before)
for _ in range(1000):  # the threads of a pool end when they have stopped spinning
    if count() == before:
        break
    time.sleep(0.01)
print(count() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_pool_has_threads_of_openmp_and_they_end() -> None:
    """One thread of Python and the two that OpenMP adds to it."""
    done = subprocess.run([sys.executable, "-c", POOLS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0"]


@pytest.fixture
def fresh() -> Iterator[None]:
    openmp.adapt_waiting.cache_clear()
    yield
    openmp.adapt_waiting.cache_clear()


def test_one_thread_waits_for_none(fresh: None) -> None:
    """The tests' own process has one thread."""
    before = threading.active_count()
    assert openmp.adapt_waiting() is None and threading.active_count() == before


def test_training_says_once_that_other_programs_use_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(openmp, "crowded", threading.Event())
    [config] = configuration.parse([], "")
    progress = Progress(best_val_loss=2.0)
    view = TrainingView(Display(1, is_estimate=False), config, tmp_path, 10, progress)
    with view:
        view.validation(progress, 2.0)
        assert "other programs" not in capsys.readouterr().out
        openmp.crowded.set()
        view.validation(progress, 2.0)
        view.validation(progress, 2.0)
    assert capsys.readouterr().out.count("other programs use cores") == 1
