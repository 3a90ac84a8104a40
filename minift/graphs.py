"""Training steps as CUDA graphs: `--graphs`.

A small step waits for the host, which needs some microseconds for each of its many kernels. A CUDA graph records the
kernels of a step once and launches them all together. It computes with fixed shapes and fixed memory, so a step is
rounded up to a bucket (`Bucket`) by filler tokens and by targets that do not count, and its rows are copied into the
bucket's input. Without dropout the losses are those of a step without a graph. With dropout the masks differ, as N
does; they follow from the step's seed all the same.

Memory: all graphs share a pool, which keeps the activations and gradients of the largest step with a graph. No other
step can use it, such as one without a graph, or the first of a bucket. --plan does not count the pool.

Not run on a GPU yet; the tests replay a stand-in on a CPU.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minift import ops
from minift.device import choose_device, choose_dtype
from minift.distributed import WORLD_SIZE
from minift.errors import UserError
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Batch, HostBatch, pinned
from minift.ops.attention import PackedRows, round_up
from minift.ops.cross_entropy import PADDING
from minift.ops.flash_attention import takes_flash
from minift.run.config import TrainOptions
from minift.training import MicroBatches, StepResult, apply_step, guarded_step, train_step

SMALL_STEP = 4096  # for auto: the most tokens of a step that waits for the host (an estimate, not measured)
MOST_GRAPHS = 64  # a graph keeps its kernels' arguments; steps of further buckets run without one


def why_no_graphs(options: TrainOptions, config: GPTConfig) -> str | None:
    """The reason why the steps of a run cannot be CUDA graphs; None if they can."""
    device = choose_device(options.device)
    if device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the device is {device}"
    dtype = choose_dtype(options.dtype, device)
    if ops.plain or not takes_flash(torch.empty(0, 3 * config.n_embd, dtype=dtype, device=device), config.n_head):
        return "padded attention has another shape in each step; FlashAttention needs bf16 and a GPU of 2020 or later"
    if options.accumulate > 1:
        return "a step must have one forward pass: leave out --accumulate"
    if WORLD_SIZE > 1:
        return "processes exchange their gradients between the kernels: use one process"
    if options.checkpoint:
        return "--checkpoint reads the state of the random numbers on the host: leave it out"
    return None


def check_graphs(options: TrainOptions, config: GPTConfig) -> None:
    """Raises UserError for --graphs on where it is impossible."""
    reason = why_no_graphs(options, config) if options.graphs == "on" else None
    if reason:
        raise UserError(f"--graphs on: {reason}; or leave --graphs out")


class Bucket(NamedTuple):
    """The sizes to which a step is rounded up."""

    tokens: int  # N; at most about an eighth is filler
    targets: int  # n, a power of two
    longest: int  # the tokens of the longest row, the filler included; a power of two

    @classmethod
    def of(cls, batch: HostBatch) -> "Bucket":
        num_tokens = len(batch.tokens)
        N = round_up(num_tokens, max(128, power_of_two(num_tokens + 1) // 16))
        return cls(N, power_of_two(max(64, len(batch.targets))),
                   power_of_two(max(128, *batch.seqlens, N - num_tokens)))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


class StepGraphs:
    """The steps of a run. The first step of each bucket runs without a graph, since it compiles kernels and creates the
    optimizer's state; the second is recorded.

    tuned: the values of modes.tuned_parameters. most_rows, most_tokens: of a step with a graph.
    """

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer, clip: float, tuned: Collection[nn.Parameter],
                 most_rows: int, most_tokens: float = math.inf):
        self.model, self.optimizer, self.clip, self.tuned = model, optimizer, clip, tuned
        self.most_rows, self.most_tokens = most_rows, most_tokens
        self.lr = torch.zeros((), device=model.device)  # a graph reads it from memory
        self.graphs: dict[Bucket, StepGraph] = {}
        self.pool: Any = None  # the memory of all graphs: one runs at a time, and only its numbers are read afterwards

    def step(self, micro_batches: MicroBatches) -> StepResult:
        """train_step and apply_step, of one micro-batch."""
        [rows] = micro_batches
        batch = HostBatch(rows, self.model.prompt_tokens)
        bucket = Bucket.of(batch)
        has_graph = bucket in self.graphs or len(self.graphs) < MOST_GRAPHS
        if not has_graph or bucket.tokens > self.most_tokens:
            result = train_step(self.model, micro_batches, self.clip, None, self.tuned)
            apply_step(self.optimizer, result)
            return result
        if bucket not in self.graphs:
            self.graphs[bucket] = StepGraph(self, bucket)
        return self.graphs[bucket].step(batch)


def make_graphs(model: GPT, optimizer: torch.optim.Optimizer, options: TrainOptions,
                tuned: Collection[nn.Parameter]) -> StepGraphs | None:
    """The graphs of a run's steps, as --graphs says; None without."""
    if options.graphs == "off" or why_no_graphs(options, model.config):
        return None
    most_tokens = SMALL_STEP if options.graphs == "auto" else math.inf
    return StepGraphs(model, optimizer, options.clip, tuned, options.batch, most_tokens)


class StepGraph:
    """The step of one bucket: its input, and from the second step on its graph."""

    def __init__(self, run: StepGraphs, bucket: Bucket):
        self.run, self.bucket = run, bucket
        N, n, _ = bucket
        self.sizes = [N, N, N, run.most_rows + 2, n, n, 1]  # of the parts of the input, see `fill`
        self.input = torch.empty(sum(self.sizes), dtype=torch.long, device=run.model.device)
        self.steps = 0
        self.graph: Any = None
        self.numbers: Tensor | None = None  # the result, which each step overwrites

    def step(self, batch: HostBatch) -> StepResult:
        self.fill(batch)
        [lr] = {group["lr"] for group in self.run.optimizer.param_groups}
        self.run.lr.fill_(lr)
        self.steps += 1
        if self.steps == 1:
            self.numbers = self.compute(batch.seqlens)
        else:
            if self.steps == 2:
                self.graph, self.numbers = record(lambda: self.compute(batch.seqlens), self.run)
            self.graph.replay()
        return StepResult(self.numbers)

    def fill(self, batch: HostBatch) -> None:
        """Copy a batch into the input, without a wait."""
        N, n, _ = self.bucket
        num_targets = len(batch.targets)
        batch.fill(N)
        no_rows = [N] * (self.run.most_rows - len(batch.seqlens))  # empty ones, behind the filler
        no_targets = n - num_targets
        lists = [batch.tokens, batch.row_ids, batch.positions, batch.cu_seqlens + no_rows,
                 batch.target_positions + [0] * no_targets, batch.targets + [PADDING] * no_targets, [num_targets]]
        self.input.copy_(pinned(lists, self.input.device), non_blocking=True)

    def compute(self, seqlens: list[int]) -> Tensor:
        """The step of the batch in the input: the numbers of its StepResult."""
        run, optimizer = self.run, self.run.optimizer
        tokens, row_ids, positions, cu_seqlens, target_positions, targets, num_targets = self.input.split(self.sizes)
        # seqlens are of one batch alone, and only their bound is read: FlashAttention takes cu_seqlens
        rows = PackedRows(seqlens, cu_seqlens.int(), self.bucket.longest, row_ids, positions)
        batch = Batch(tokens, rows, target_positions, targets, target_positions, has_padding=True)
        loss = run.model.loss(batch) / num_targets[0]
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(run.tuned, run.clip or math.inf)
        numbers = torch.stack([loss.detach(), grad_norm])
        lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = run.lr
        guarded_step(optimizer, numbers)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)  # inside: the gradients belong to the graph's memory
        return numbers


def record(compute: Callable[[], Tensor], run: StepGraphs) -> tuple[Any, Tensor]:
    """The kernels of `compute()` as a graph, and the tensor that each replay fills. They do not run now."""
    groups = run.optimizer.param_groups
    for group in groups:
        group["capturable"] = True  # AdamW wants it here, and without a graph it warns
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=run.pool):
        numbers = compute()
    run.pool = graph.pool()
    for group in groups:
        group["capturable"] = False
    return graph, numbers
