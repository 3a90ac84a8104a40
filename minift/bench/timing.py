"""Times of short work, by CUDA events on a GPU and by the clock elsewhere."""

import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

SAMPLE_SECONDS = 0.01  # the least time of a sample on a GPU: the events and the first launch then cost under 1 %
WARMUP = 3  # samples that are not counted
Key = TypeVar("Key", bound=Hashable)
Work = Callable[[], Any]


def sample_seconds(work: Work, calls: int, device: torch.device) -> float:
    """One sample: the seconds of a call, the mean of `calls` calls one after another."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls
    # the GPU notes the time itself when it reaches an event: no wait of the host is in the measured time
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls  # elapsed_time is in ms


def calls_per_sample(work: Work, device: torch.device) -> int:
    """The calls that take SAMPLE_SECONDS on a GPU; 1 on a CPU, where a call is long enough."""
    if device.type != "cuda":
        return 1
    work()  # compiles
    return max(1, math.ceil(SAMPLE_SECONDS / sample_seconds(work, 3, device)))


def time_in_turn(works: dict[Key, Work], samples: int, device: torch.device) -> dict[Key, list[float]]:
    """Seconds of a call of each, `samples` of them. They take turns, sample by sample, so that a machine whose speed
    drifts slows all of them down."""
    calls = {key: calls_per_sample(work, device) for key, work in works.items()}
    times: dict[Key, list[float]] = {key: [] for key in works}
    for sample in range(WARMUP + samples):
        for key, work in works.items():
            seconds = sample_seconds(work, calls[key], device)
            if sample >= WARMUP:
                times[key].append(seconds)
    return times


def time_each(works: Sequence[Work], device: torch.device) -> list[float]:
    """The seconds of each call, one after another. On a GPU the host does not wait between them, as in a training
    loop: the time of a call is that between two events."""
    if device.type != "cuda":
        return [sample_seconds(work, 1, device) for work in works]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
