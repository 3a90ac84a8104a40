"""The progress bar of reading and tokenizing: on a terminal alone, and only where it takes longer than a second."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(steps: Iterable[T], title: str, rows_per_step: int = 1) -> Iterable[T]:
    return tqdm(steps, title, unit=" rows", unit_scale=rows_per_step, delay=1, leave=False, file=sys.stdout,
                disable=not sys.stdout.isatty())
