"""The parts of a training run that train.py, the plan and the benchmarks share: how a configuration becomes a model and
an optimizer, in which order rows are trained on, the learning rate, and one optimizer step."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from minift import modes
from minift.data.dataset import batches, file_batches
from minift.data.tokens import Example
from minift.device import choose_device, choose_dtype
from minift.distributed import WORLD_SIZE, full_tensor, local_rows, to_device
from minift.errors import UserError
from minift.files import checkpoint
from minift.files.checkpoint import LAST, TUNED, Progress
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.ops.kernel_choice import check_kernel
from minift.report import metrics
from minift.run.config import Config, TrainOptions
from minift.run.extend import how_to_extend, resumable, undo_early_stop

MicroBatches = list[Sequence[Row]]  # the rows of an optimizer step, one batch for each forward pass


def apply_config(model: GPT, config: Config) -> None:
    """Turn a copy of the base into the model that a run trains."""
    options, device = config.train, choose_device(config.train.device)
    modes.apply(model, config.mode, config.mode_options)
    model.dropout, model.checkpoint = options.model_dropout, options.checkpoint
    # after the mode: only now it is known which weights are frozen and can be stored in the compute dtype
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    check_kernel(options.kernel, device)
    model.set_kernel(options.kernel)


def build_on_meta(base: Base, config: Config) -> GPT:
    """The model that a run will train, without values: for the plan, and to check the options before anything is
    written. Raises UserError for options that this base cannot be tuned with."""
    model = base.model.shared_copy().to("meta")
    apply_config(model, config)
    if not modes.tuned_parameters(model):
        raise UserError(f"--mode {config.mode} leaves nothing to train in {base.folder} with these options")
    if config.adapter is not None:
        modes.check_tuned(model, config.adapter.tensors, config.adapter.source)
    room, new_tokens = model.config.n_positions - model.prompt_tokens, config.train.max_new_tokens
    if new_tokens is not None and new_tokens >= room:
        raise UserError(f"--max-new-tokens {new_tokens} leaves no room for a prompt in the {room} "
                        "positions of the model: lower it")
    return model


def build(base: Base, config: Config) -> GPT:
    """The model that a run trains, with the mode's initial values, on the run's device."""
    torch.manual_seed(config.train.seed)
    model = base.model.shared_copy()
    apply_config(model, config)
    if start := modes.MODES[config.mode].start:
        start(model, config.mode_options, base.tokenizer)
    if config.adapter is not None:
        modes.load_tuned(model, config.adapter.tensors, config.adapter.source)
    to_device(model, choose_device(config.train.device), config.train.shard)
    return model


def untouched_base(base: Base, options: TrainOptions) -> GPT:
    """A copy of the base that computes as a run's model does, to be scored."""
    device = choose_device(options.device)
    model = base.model.shared_copy()
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    to_device(model, device, options.shard)
    return model


def make_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the parameters that train. Matrices decay, unless a mode marks them `no_decay`; vectors (biases and
    norms) do not."""
    decayed, others = [], []
    for parameter in modes.tuned_parameters(model).values():
        decays = parameter.dim() >= 2 and not getattr(parameter, "no_decay", False)
        (decayed if decays else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = model.device.type != "mps"
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=fused)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of a step (0 is the first): linear warm-up to options.lr, then the schedule, down to 0."""
    warmup = math.ceil(steps * options.warmup_ratio)
    if step < warmup:
        return options.lr * ((step + 1) / warmup)
    done = (step - warmup) / max(1, steps - warmup)
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
    return math.ceil(math.ceil(num_rows / options.batch) / options.accumulate)


def total_steps(num_rows: int, options: TrainOptions) -> int:
    if options.steps is not None:
        return options.steps
    return max(1, round(options.epochs * steps_per_epoch(num_rows, options)))


def iterate_steps(rows: Sequence[Row], options: TrainOptions, first: int) -> Iterator[MicroBatches]:
    """The rows of each optimizer step from step `first` on, without end. An epoch's order depends only on the seed
    and the epoch's number, so a run resumes at any step."""
    epoch, skipped = divmod(first, steps_per_epoch(len(rows), options))
    while True:
        if options.order == "file":
            order = file_batches(rows, options.batch)
        else:
            order = batches(rows, options.batch, options.seed, epoch)
        for i in range(skipped * options.accumulate, len(order), options.accumulate):
            yield order[i : i + options.accumulate]
        epoch, skipped = epoch + 1, 0


def largest_batch(rows: Sequence[Row], options: TrainOptions) -> Sequence[Row]:
    """The largest batch of a run, each row counted at the length of the longest: it decides the peak memory."""
    steps = itertools.islice(iterate_steps(rows, options, 0), total_steps(len(rows), options))
    return max((batch for micro_batches in steps for batch in micro_batches),
               key=lambda batch: len(batch) * max(len(row.ids) for row in batch))


def train_step(model: GPT, micro_batches: MicroBatches, clip: float,
               replica: nn.Module | None = None) -> tuple[float, float]:
    """Compute the gradients of one optimizer step. Returns the loss in nats per target token, of this rank's rows, and
    the norm of the gradient before clipping.

    The loss is the sum over the targets of all micro-batches divided by their number, so 1 x 8 rows and 8 x 1 row are
    the same step, and so are 2 x 4 on two ranks. `replica` comes from distributed.replicate.
    """
    targets_in_step = sum(row.num_targets for batch in micro_batches for row in batch)
    loss_sum = 0.0
    for number, batch in enumerate(micro_batches, start=1):
        packed = model.pack(local_rows(batch))  # the only place where training rows become tensors
        # ranks exchange gradients once a step, after the last micro-batch
        wait = replica.no_sync() if replica and number < len(micro_batches) else contextlib.nullcontext()
        with wait:
            loss = (replica or model.loss)(packed) / targets_in_step
            (loss * WORLD_SIZE).backward()  # the exchange averages: undo its division
        loss_sum += loss.item()
    tuned = modes.tuned_parameters(model).values()
    return loss_sum, nn.utils.clip_grad_norm_(tuned, clip or math.inf).item()


def run_metadata(config: Config, base: Base, rows: dict[str, list[Example]]) -> dict[str, str]:
    """What the files of a run belong to: base, mode, options and rows."""
    return checkpoint.run_metadata(
        checkpoint.base_metadata(base.fingerprint, config.mode, config.mode_options, base.name),
        checkpoint.training_metadata(config.train, rows, ignored=config.resume_changes))


def init_or_resume(model: GPT, config: Config, rows: dict[str, list[Example]], folder: Path, metadata: dict[str, str],
                   optimizer: torch.optim.Optimizer) -> Progress:
    """A new run, saved before its first step, or the state of the one to resume."""
    options = config.train
    if not options.resume or not checkpoint.has_saved(folder):
        checkpoint.save_last(folder, model, metadata, optimizer, Progress())
        return Progress()
    progress = checkpoint.load_last(folder, model, metadata, optimizer)
    if config.extended and progress.early_stopped:
        undo_early_stop(progress, options.patience)
        checkpoint.save_last(folder, model, metadata, optimizer, progress)
    has_best = progress.best_step or progress.best_val_loss < math.inf  # a run of an earlier version has no step 0
    if progress.step and has_best and not checkpoint.best_is_intact(folder, metadata):
        print(f"{folder / TUNED} is missing or damaged: the best parameters, of step {progress.best_step}, are lost; "
              f"those of step {progress.step} replace them")
        progress.best_val_loss = progress.best_after_start = math.inf
        validate(model, rows["val"], options, folder, metadata, progress)
    steps = total_steps(len(rows["train"]), options)
    if progress.step >= steps or progress.early_stopped:
        print(how_to_extend(config, resumable(config, folder)))
    elif config.extended:
        print(describe_extension(config, progress.step, steps))
    return progress


def validate(model: GPT, val_rows: list[Example], options: TrainOptions, folder: Path, metadata: dict[str, str],
             progress: Progress) -> float | None:
    """The validation loss. Saves the parameters if it is the best so far, and decides on early stopping. Without rows
    there is no loss, and the latest parameters are saved."""
    val_loss = metrics.measure_losses(model, val_rows, options.batch)["loss"] if val_rows else None
    if val_loss is not None and not math.isfinite(val_loss):
        raise UserError(f"step {progress.step}: the validation loss is {val_loss}; the files in {folder} are from "
                        "before and intact: lower --lr")
    if progress.window_steps:
        progress.train_loss = progress.window_loss / progress.window_steps
    progress.window_loss, progress.window_steps = 0.0, 0
    if val_loss is None or val_loss < progress.best_val_loss:
        progress.best_step = progress.step
        progress.best_val_loss = math.inf if val_loss is None else val_loss
        checkpoint.save_tuned(folder, model, metadata, progress)
    if val_loss is not None and progress.step > 0:
        # the start does not count: a run may be worse than it while the learning rate is high, and beat it at the end
        progress.evals_since_best += 1
        if val_loss < progress.best_after_start:
            progress.best_after_start, progress.evals_since_best = val_loss, 0
        progress.early_stopped = 0 < options.patience <= progress.evals_since_best
    return val_loss


def status(mode: str, progress: Progress, steps: int, val_loss: float | None, lr: float = 0.0) -> str:
    """The line printed after a validation."""
    line = f"{mode} step {progress.step}/{steps}"
    val = "" if val_loss is None else f"  val {val_loss:.4f}"
    if progress.step == 0:
        return f"{line}{val}  the start"
    best = "  best" if val and progress.best_step == progress.step else ""
    speed = progress.tokens / progress.seconds
    return f"{line}  train {progress.train_loss:.4f}{val}  lr {lr:.1e}  {speed:,.0f} tokens/s{best}"


def bad_step(model: GPT, loss: float, micro_batches: MicroBatches, step: int, folder: Path) -> UserError:
    """The error for a loss or gradient that is not finite: where to look. The parameters on the disk are good."""
    norms = {}
    for name, parameter in modes.tuned_parameters(model).items():
        if parameter.grad is not None:
            norm = full_tensor(parameter.grad).norm().item()
            norms[name] = norm if math.isfinite(norm) else math.inf
    worst = max(norms, key=norms.__getitem__)
    rows = ", ".join(row.pair.where for batch in micro_batches for row in batch)
    intact = f"{folder / LAST} is intact" if (folder / LAST).exists() else "nothing is saved yet"
    return UserError(f"step {step}: the loss is {loss} and the largest gradient, of {worst}, has norm {norms[worst]}; "
                     f"rows: {rows}; {intact}; lower --lr, look at these rows, or try --dtype fp32")
