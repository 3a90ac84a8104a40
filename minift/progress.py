"""The progress of a training run: its start or resume, its validations, and the errors that end it."""

import math
from pathlib import Path

import torch
from torch import nn

from minift import modes
from minift.data.row_store import Examples
from minift.device import choose_device, give_back_memory, peak_memory
from minift.distributed import full_tensor, seed_step
from minift.errors import TrainingFailed
from minift.files import checkpoint
from minift.files.checkpoint import LAST, TUNED, Progress
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.report import metrics
from minift.run.config import Config
from minift.run.extend import how_to_extend, undo_early_stop
from minift.training import MicroBatches, add_gradients, learning_rate, total_steps


def run_metadata(config: Config, base: Base, rows: dict[str, Examples]) -> dict[str, str]:
    """The metadata of a run's files, which must agree when it resumes: base, mode, options and rows."""
    base_metadata = checkpoint.base_metadata(base.fingerprint, config.mode, config.mode_options, base.name)
    training_metadata = checkpoint.training_metadata(config.train, rows, ignored=config.resume_changes)
    return checkpoint.run_metadata(base_metadata, training_metadata)


def describe_extension(config: Config, done: int, steps: int) -> str:
    """The line for a run that continues after `done` steps with another number of steps or another patience."""
    options = config.train
    return (f"{config.mode}: continues after step {done}, up to step {steps}; the {options.schedule} schedule covers "
            f"all {steps} steps, so the learning rate is now {learning_rate(done, steps, options):.1e}")


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
        validate(model, rows["val"], config, folder, metadata, progress)
        checkpoint.save_last(folder, model, metadata, optimizer, progress)  # it names the best loss
    steps = total_steps(len(rows["train"]), options)
    if options.resume and (progress.step >= steps or progress.early_stopped):
        print(how_to_extend(config))
    elif config.extended:
        print(describe_extension(config, progress.step, steps))
    return progress


def validate(model: GPT, val_rows: Examples, config: Config, folder: Path, metadata: dict[str, str],
             progress: Progress) -> float | None:
    """The validation loss in nats per target. Saves the parameters if the loss is the best so far, decides on early
    stopping, notes the peak of the memory, and gives freed memory back. Without validation rows there is no loss
    (None), and the latest parameters are saved."""
    options = config.train
    give_back_memory()  # the holes that the steps left in the heap, so that the validation can use that memory
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
        progress.early_stopped = 0 < options.patience <= progress.evals_since_best or is_behind(config, progress)
    peak = peak_memory(choose_device(options.device)) or 0
    progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak)  # a process before this one may have had more
    give_back_memory()  # and those that the validation left
    return val_loss


def is_behind(config: Config, progress: Progress) -> bool:
    """Whether a trial stops at this step, because it is far behind an earlier trial."""
    return progress.best_val_loss > config.stop_losses.get(progress.step, math.inf)


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
    return TrainingFailed(f"step {step}: the loss is {loss} and the largest gradient, of {worst}, has norm "
                          f"{norms[worst]}; rows: {rows}; {folder / LAST} is intact; lower --lr, look "
                          "at these rows, or try --dtype fp32")


def check_learned(model: GPT, initial: str, folder: Path) -> None:
    """Raises TrainingFailed if the parameters have the checksum `initial`, that of before the first step."""
    if checkpoint.checksum(modes.tuned_parameters(model), {}) == initial:
        raise TrainingFailed(f"{folder}: the tuned parameters equal their initial values, nothing was learned: raise "
                             "--lr or --steps")
