"""Benchmarks that can be believed: python -m minift.bench train | kernels

    train      tokens/s, step time, peak memory and arithmetic rate of each mode, with random weights
    kernels    the low-rank update of one layer, by every implementation that runs here

Warm-up is apart, medians come with their spread, and the machine's own ceiling is measured in the same run.
The last line is one JSON object.
"""

import os
import sys

from minift.bench.kernels import bench_kernels
from minift.bench.train import bench_train
from minift.errors import UserError, run_script


def main(arguments: list[str]) -> None:
    jobs = {"train": bench_train, "kernels": bench_kernels}
    if not arguments or arguments[0] not in jobs:
        if arguments[:1] in (["-h"], ["--help"]):
            print(__doc__)
            return
        raise UserError(f"say what to measure: python -m minift.bench {' | '.join(jobs)} (--help lists more)")
    jobs[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    run_script(main)
