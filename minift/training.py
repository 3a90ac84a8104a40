"""The parts of a training run: from a configuration to a model and an optimizer, the learning rate, the order of the
rows, and one optimizer step. The plan and the benchmarks use some of them.
"""

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minift import modes
from minift.data.dataset import batches, file_batches, row_lengths
from minift.device import choose_device, choose_dtype
from minift.distributed import WORLD_SIZE, full_tensor, local_rows, to_device
from minift.errors import UserError
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.ops.attention import padded_length
from minift.ops.kernel_choice import check_kernel
from minift.run.config import Config, TrainOptions

MicroBatches = list[Sequence[Row]]  # the rows of an optimizer step, one batch for each forward pass


# ---- the model and its optimizer

def apply_config(model: GPT, config: Config) -> None:
    """Turn a copy of the base into the model that a run trains, in place."""
    options = config.train
    device = choose_device(options.device)
    modes.apply(model, config.mode, config.mode_options)
    model.dropout, model.checkpoint = options.model_dropout, options.checkpoint
    # after the mode, which decides what is frozen: only frozen weights are stored in the compute dtype
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    if modes.MODES[config.mode].uses_kernel:  # in a comparison, the other modes compute as they do alone
        check_kernel(options.kernel, device)
        model.set_kernel(options.kernel)


def build_on_meta(base: Base, config: Config) -> GPT:
    """The model that a run will train, without values: for the plan, and to check the options before anything is
    written. Raises UserError for options that this base cannot be tuned with."""
    model = base.model.shared_copy().to("meta")  # shapes and dtypes without memory
    apply_config(model, config)
    if not modes.tuned_parameters(model):  # such as LoRA with rank 0 in every layer
        raise UserError(f"--mode {config.mode} leaves nothing to train in {base.folder} with these options")
    if config.adapter is not None:
        modes.check_tuned(model, config.adapter.tensors, config.adapter.source)
    # the predictions at the end of a run need at least one token to start from
    free_positions = model.config.n_positions - model.prompt_tokens
    new_tokens = config.train.max_new_tokens
    if new_tokens is not None and new_tokens >= free_positions:
        raise UserError(f"--max-new-tokens {new_tokens} leaves no room for a prompt in the {free_positions} positions "
                        "of the model: lower it")
    return model


def build(base: Base, config: Config) -> GPT:
    """The model that a run trains, with the mode's initial values, on the run's device."""
    torch.manual_seed(config.train.seed)  # for the initial values that the mode draws
    model = base.model.shared_copy()
    apply_config(model, config)
    if start := modes.MODES[config.mode].start:
        start(model, config.mode_options, base.tokenizer)
    if config.adapter is not None:  # --adapter: start from the parameters of an earlier run
        modes.load_tuned(model, config.adapter.tensors, config.adapter.source)
    # last, since on the CPU all ranks draw the same values, and a sharded model has only parts of them
    to_device(model, choose_device(config.train.device), config.train.shard)
    return model


def untouched_base(base: Base, options: TrainOptions) -> GPT:
    """A copy of the base with the compute dtype and the device of a run, so that the scores of both compare."""
    device = choose_device(options.device)
    model = base.model.shared_copy()
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    to_device(model, device, options.shard)
    return model


def make_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) on the parameters that train. Matrices decay, unless a mode marks them
    `no_decay`; vectors (biases and norms) do not."""
    decayed, others = [], []
    for parameter in modes.tuned_parameters(model).values():
        if parameter.dim() >= 2 and not getattr(parameter, "no_decay", False):
            decayed.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # torch refuses an empty one
    fused = model.device.type != "mps"  # one kernel for all parameters; not on Apple's GPUs
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused)
    if reads_late(model.device):
        optimizer.found_inf = torch.zeros((), device=model.device)  # the fused kernel changes nothing where it is 1
    return optimizer


# ---- the steps

def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of a step, where 0 is the first step and `steps` their number: linear warm-up to options.lr,
    then constant, or down to 0 on a line or half a cosine."""
    warmup = math.ceil(steps * options.warmup_ratio)
    if step < warmup:
        return options.lr * ((step + 1) / warmup)  # step + 1: a first step with rate 0 would be lost
    done = (step - warmup) / max(1, steps - warmup)  # from 0 to 1; max: with warm-up alone there are no steps after it
    if options.schedule == "constant":
        return options.lr
    if options.schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * ((1 + math.cos(math.pi * done)) / 2)


def steps_per_epoch(num_rows: int, options: TrainOptions) -> int:
    """The optimizer steps of one pass over the rows; the last batch, and the last step, may be smaller."""
    batches_per_epoch = math.ceil(num_rows / options.batch)
    return math.ceil(batches_per_epoch / options.accumulate)


def total_steps(num_rows: int, options: TrainOptions) -> int:
    """The optimizer steps of a run: --steps, else --epochs."""
    if options.steps is not None:
        return options.steps
    return max(1, round(options.epochs * steps_per_epoch(num_rows, options)))


def iterate_numbers(lengths: np.ndarray, options: TrainOptions, first: int) -> Iterator[list[np.ndarray]]:
    """The row numbers of each batch of each optimizer step, from step `first` on, without end. `lengths` are those of
    the rows. The order of an epoch depends on the seed and the number of the epoch alone, so a run resumes at any
    step."""
    epoch, skipped = divmod(first, steps_per_epoch(len(lengths), options))
    while True:
        if options.order == "file":
            order = file_batches(lengths, options.batch)
        else:
            order = batches(lengths, options.batch, options.seed, epoch)
        for i in range(skipped * options.accumulate, len(order), options.accumulate):
            yield order[i : i + options.accumulate]
        epoch, skipped = epoch + 1, 0


def iterate_steps(rows: Sequence[Row], options: TrainOptions, first: int) -> Iterator[MicroBatches]:
    """The rows of each optimizer step, from step `first` on, without end."""
    for step in iterate_numbers(row_lengths(rows), options, first):
        yield [[rows[number] for number in batch] for batch in step]


def largest_batch(rows: Sequence[Row], options: TrainOptions) -> Sequence[Row]:
    """The batch of a run that needs the most memory. It decides the peak."""
    lengths = row_lengths(rows)
    steps = itertools.islice(iterate_numbers(lengths, options, 0), total_steps(len(rows), options))
    largest, largest_size = [], 0
    for micro_batches in steps:
        for batch in micro_batches:
            # each row at the length of the longest, as attention in fp32 on a GPU pads it
            size = len(batch) * lengths[batch].max()
            if size > largest_size:
                largest, largest_size = batch, size
    return [rows[number] for number in largest]


def count_totals(rows: Sequence[Row], options: TrainOptions) -> int:
    """How many different numbers of tokens the batches of a run have, where they are padded for oneDNN."""
    lengths = row_lengths(rows)
    steps = itertools.islice(iterate_numbers(lengths, options, 0), total_steps(len(rows), options))
    totals = set()
    for micro_batches in steps:
        for batch in micro_batches:
            seqlens = (lengths[batch] - 1).tolist()  # the model does not read the last token of a row
            totals.add(padded_length(seqlens, round_shapes=True))
    return len(totals)


class StepResult:
    """The loss and the gradient norm of a step, which a GPU may still compute."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers  # on the device: the loss of each micro-batch, and the norm
        self.on_host, self.copied = self.numbers, None
        if self.numbers.is_cuda:
            self.on_host = self.numbers.to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> tuple[float, float]:
        """This rank's part of the loss in nats per target (the sum over the ranks is the loss of the step), and the
        norm of the gradient before clipping. Waits for this step alone, not for one that was begun after it."""
        if self.copied is not None:
            self.copied.synchronize()
        *losses, grad_norm = self.on_host.tolist()
        return sum(losses), grad_norm


def reads_late(device: torch.device) -> bool:
    """Whether the loss of a step is read only after the next step was begun. So a GPU always has work; on a CPU there
    is no wait to save."""
    return device.type == "cuda"


class FinishedStep(NamedTuple):
    """A step and its numbers."""

    micro_batches: MicroBatches
    lr: float
    loss: float  # this rank's part, in nats per target
    grad_norm: float
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for batch in self.micro_batches for row in batch)


class PendingSteps:
    """Steps that have begun and whose numbers are not read yet. A GPU computes one of them while the numbers of the one
    before are read; on a CPU each is read at once."""

    def __init__(self, device: torch.device):
        self.steps: deque[tuple[MicroBatches, float, StepResult]] = deque()
        self.most = 1 if reads_late(device) else 0
        self.clock = 0.0

    def __len__(self) -> int:
        return len(self.steps)

    def start_clock(self) -> None:
        """Before each step. With other steps pending, the clock runs since the last one was read."""
        if not self.steps:
            self.clock = time.perf_counter()

    def add(self, micro_batches: MicroBatches, lr: float, result: StepResult) -> None:
        self.steps.append((micro_batches, lr, result))

    def read(self, wait: bool) -> FinishedStep | None:
        """The oldest step; None if no other step may be pending, or with `wait` if there is none."""
        if len(self.steps) <= (0 if wait else self.most):
            return None
        micro_batches, lr, result = self.steps.popleft()
        loss, grad_norm = result.read()
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        return FinishedStep(micro_batches, lr, loss, grad_norm, seconds)


def train_step(model: GPT, micro_batches: MicroBatches, clip: float, replica: nn.Module | None = None,
               tuned: Collection[nn.Parameter] | None = None) -> StepResult:
    """Compute and clip the gradients of one optimizer step, without waiting for a GPU.

    clip: the largest norm, 0 for no limit. replica: of distributed.replicate. tuned: the values of
    modes.tuned_parameters, for a caller that knows them already.
    """
    losses = add_gradients(model, micro_batches, replica)
    tuned = tuned or modes.tuned_parameters(model).values()
    grad_norm = nn.utils.clip_grad_norm_(tuned, clip or math.inf)  # inf: only compute the norm
    return StepResult(torch.stack([*losses, full_tensor(grad_norm)]))


def add_gradients(model: GPT, micro_batches: MicroBatches, replica: nn.Module | None) -> list[Tensor]:
    """The loss and the gradients of each micro-batch, which add up to those of the step."""
    # The sum over all targets of the step divided by their number, not a mean of the means of micro-batches: so 1 x 8
    # rows and 8 x 1 row are the same step, and so are 2 x 4 on two ranks.
    targets_in_step = sum(row.num_targets for batch in micro_batches for row in batch)
    losses = []
    for number, batch in enumerate(micro_batches, start=1):
        packed = model.pack(local_rows(batch))  # the only place where training rows become tensors
        # ranks exchange gradients once a step, after the last micro-batch
        is_last = number == len(micro_batches)
        no_exchange = replica.no_sync() if replica and not is_last else contextlib.nullcontext()
        with no_exchange:
            loss = (replica or model.loss)(packed)
            # the gradient of a mean over the targets; the exchange averages over the ranks, and a sum is needed
            loss.backward(torch.full_like(loss, WORLD_SIZE / targets_in_step))
        losses.append(loss.detach() / targets_in_step)
    return losses


def apply_step(optimizer: torch.optim.Optimizer, result: StepResult) -> None:
    """Update the parameters and free the gradients. After a loss or a gradient that is not finite, the parameters stay
    as they are, in this step and in all later ones."""
    if hasattr(optimizer, "found_inf"):
        guarded_step(optimizer, result.numbers)
    elif all(map(math.isfinite, result.read())):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def guarded_step(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """The optimizer's step, if the numbers of this step and of those before are finite. The device decides, so that
    nothing waits for them."""
    largest = numbers.abs().amax()  # nan if a number is; isfinite().all() would take two kernels more
    optimizer.found_inf.masked_fill_(~(largest < math.inf), 1.0)
    optimizer.step()
