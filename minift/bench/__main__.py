"""Benchmarks: python -m minift.bench train | decode | kernels | data | peer | plan | gpu

    train      tokens/s, step time, peak memory and arithmetic rate of each mode, with random weights
    decode     tokens/s of generation, with random weights
    kernels    the low-rank update of one layer, in every implementation that can run here
    data       seconds and memory from a file to rows of tokens, up to a million rows
    peer       train.py beside transformers and PEFT, on the same rows
    plan       the predicted and the measured peak memory of each mode
    gpu        half an hour on a GPU: correctness, kernels, training, decoding; one report

Each but the last prints a table, and one JSON object on the last line. --help after the name lists the options.
"""

from minift.bench.data import bench_data
from minift.bench.decode import bench_decode
from minift.bench.gpu import bench_gpu
from minift.bench.kernels import bench_kernels
from minift.bench.peer import bench_peer
from minift.bench.plan import bench_plan
from minift.bench.train import bench_train
from minift.device import configure_process
from minift.errors import UserError, run_script

BENCHMARKS = {"train": bench_train, "decode": bench_decode, "kernels": bench_kernels, "data": bench_data,
              "peer": bench_peer, "plan": bench_plan, "gpu": bench_gpu}


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not arguments or arguments[0] not in BENCHMARKS:
        raise UserError(f"name a benchmark: python -m minift.bench {' | '.join(BENCHMARKS)}, or --help")
    configure_process()  # as train.py and eval.py do, or steps would be slower here than there
    BENCHMARKS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    run_script(main)
