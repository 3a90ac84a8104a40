"""The parts of a training run: from a configuration to a model and an optimizer, the learning rate, the order of the
rows, one optimizer step, and the start, validation and resume of a run. The plan and the benchmarks use some of them.
"""

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minift import modes
from minift.data.dataset import batches, file_batches, row_lengths
from minift.data.row_store import Examples
from minift.device import choose_device, choose_dtype, peak_memory
from minift.distributed import WORLD_SIZE, full_tensor, local_rows, seed_step, to_device
from minift.errors import TrainingFailed, UserError
from minift.files import checkpoint
from minift.files.checkpoint import LAST, TUNED, Progress
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.ops.kernel_choice import check_kernel
from minift.report import metrics
from minift.run.config import Config, TrainOptions
from minift.run.extend import how_to_extend, undo_early_stop

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
    groups = []
    if decayed:
        groups.append({"params": decayed, "weight_decay": weight_decay})
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
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


def describe_extension(config: Config, done: int, steps: int) -> str:
    """The line for a run that continues after `done` steps with another number of steps or another patience."""
    options = config.train
    return (f"{config.mode}: continues after step {done}, up to step {steps}; the {options.schedule} schedule covers "
            f"all {steps} steps, so the learning rate is now {learning_rate(done, steps, options):.1e}")


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
            loss = (replica or model.loss)(packed) / targets_in_step
            (loss * WORLD_SIZE).backward()  # the exchange averages over the ranks, and a sum is needed
        losses.append(loss.detach())
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
    optimizer.found_inf.masked_fill_(~numbers.isfinite().all(), 1.0)
    optimizer.step()


# ---- the state of a run

def run_metadata(config: Config, base: Base, rows: dict[str, Examples]) -> dict[str, str]:
    """The metadata of a run's files, which must agree when it resumes: base, mode, options and rows."""
    base_metadata = checkpoint.base_metadata(base.fingerprint, config.mode, config.mode_options, base.name)
    training_metadata = checkpoint.training_metadata(config.train, rows, ignored=config.resume_changes)
    return checkpoint.run_metadata(base_metadata, training_metadata)


def init_or_resume(model: GPT, config: Config, rows: dict[str, Examples], folder: Path, metadata: dict[str, str],
                   optimizer: torch.optim.Optimizer) -> Progress:
    """The progress of a new run, or of the run in `folder` that resumes, whose model and optimizer are loaded."""
    options = config.train
    if not checkpoint.has_saved(folder):
        # saved before the first step, so that a run can resume wherever it ends
        checkpoint.save_last(folder, model, metadata, optimizer, Progress())
        return Progress()
    progress = checkpoint.load_last(folder, model, metadata, optimizer)
    if config.extended and progress.early_stopped:
        undo_early_stop(progress, options.patience)
        checkpoint.save_last(folder, model, metadata, optimizer, progress)
    # the best parameters are in another file; if it is lost, the current ones are the best that are left
    has_best = progress.best_step or progress.best_val_loss < math.inf  # a run of an earlier version has no step 0
    if progress.step and has_best and not checkpoint.best_is_intact(folder, metadata):
        print(f"{folder / TUNED} is missing or damaged: the best parameters, of step {progress.best_step}, are lost; "
              f"those of step {progress.step} replace them")
        progress.best_val_loss = progress.best_after_start = math.inf
        validate(model, rows["val"], options, folder, metadata, progress)
    steps = total_steps(len(rows["train"]), options)
    if options.resume and (progress.step >= steps or progress.early_stopped):
        print(how_to_extend(config))
    elif config.extended:
        print(describe_extension(config, progress.step, steps))
    return progress


def validate(model: GPT, val_rows: Examples, options: TrainOptions, folder: Path, metadata: dict[str, str],
             progress: Progress) -> float | None:
    """The validation loss in nats per target. Saves the parameters if the loss is the best so far, decides on early
    stopping, and notes the peak of the memory. Without validation rows there is no loss (None), and the latest
    parameters are saved."""
    val_loss = metrics.measure_losses(model, val_rows, options.batch)["loss"] if val_rows else None
    if val_loss is not None and not math.isfinite(val_loss):
        raise TrainingFailed(f"step {progress.step}: the validation loss is {val_loss}; the files in {folder} are from "
                             "before and intact: lower --lr")
    # the training loss is a mean over the steps since the last validation
    if progress.window_steps:
        progress.train_loss = progress.window_loss / progress.window_steps
    progress.window_loss, progress.window_steps = 0.0, 0
    if val_loss is None or val_loss < progress.best_val_loss:
        progress.best_step = progress.step
        progress.best_val_loss = math.inf if val_loss is None else val_loss
        checkpoint.save_tuned(folder, model, metadata, progress)
    if val_loss is not None and progress.step > 0:
        # Early stopping does not count the loss of the start: a run may be worse while the learning rate is high, and
        # better at the end.
        progress.evals_since_best += 1
        if val_loss < progress.best_after_start:
            progress.best_after_start, progress.evals_since_best = val_loss, 0
        progress.early_stopped = 0 < options.patience <= progress.evals_since_best
    peak = peak_memory(choose_device(options.device)) or 0
    progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak)  # a process before this one may have had more
    return val_loss


def bad_step(model: GPT, loss: float, micro_batches: MicroBatches, step: int, folder: Path, seed: int,
             replica: nn.Module | None) -> TrainingFailed:
    """The error for a loss or gradient that is not finite. It names the step, the parameter with the largest gradient,
    and the rows. The step was not applied, so saved parameters are good."""
    # once more, since the gradients are gone
    model.zero_grad()
    seed_step(seed, step - 1)
    add_gradients(model, micro_batches, replica)
    norms = {}
    for name, parameter in modes.tuned_parameters(model).items():
        if parameter.grad is not None:
            norm = full_tensor(parameter.grad).norm().item()
            norms[name] = norm if math.isfinite(norm) else math.inf  # nan would not compare
    worst = max(norms, key=norms.__getitem__)
    rows = ", ".join(row.pair.where for batch in micro_batches for row in batch)
    intact = f"{folder / LAST} is intact" if (folder / LAST).exists() else "nothing is saved yet"
    return TrainingFailed(f"step {step}: the loss is {loss} and the largest gradient, of {worst}, has norm "
                          f"{norms[worst]}; rows: {rows}; {intact}; lower --lr, look at these rows, or try --dtype "
                          "fp32")


def check_learned(model: GPT, initial: str, folder: Path) -> None:
    """Raises TrainingFailed if the parameters have the checksum `initial`, that of before the first step."""
    if checkpoint.checksum(modes.tuned_parameters(model), {}) == initial:
        raise TrainingFailed(f"{folder}: the tuned parameters equal their initial values, nothing was learned: raise "
                             "--lr or --steps")
