"""train.py --resume RUN with --epochs, --steps or --patience: a run continues beyond its end."""

from dataclasses import replace
from pathlib import Path

from minift.distributed import broadcast, is_main
from minift.errors import UserError
from minift.files import checkpoint
from minift.files.checkpoint import Progress
from minift.run import config as configuration
from minift.run.config import Config
from minift.run.folder import read_metrics


def extend(runs: list[tuple[Config, Path, dict[str, str]]], steps: int) -> None:
    """Save the new options of every run, and remove the results of the shorter runs. A run comes with the metadata
    that its files must have; `steps` is the new number of steps.

    Raises UserError, before anything changes, if a run cannot be continued, has done more steps already, or is still
    searched for.
    """
    for config, folder, metadata in runs:
        if not checkpoint.has_saved(folder):
            if config.search:
                raise UserError(f"{folder} has trials to do: train.py --resume {config.root} without new options ends "
                                "the search, and what it chooses can then be continued")
            continue  # a run of a comparison that did not begin yet
        done = checkpoint.saved_progress(folder, metadata).step
        if done:
            broadcast(lambda folder=folder: bool(read_metrics(folder)))  # raises if the file is damaged
        if steps < done:
            raise UserError(f"{folder} has done {done} steps already, and would end after {steps} with these options: "
                            "give a larger --epochs or --steps")
    for config, folder, _ in runs:
        if is_main():
            # first: a run of a comparison that has a result.json is not run again
            (folder / "result.json").unlink(missing_ok=True)
        configuration.save(folder, replace(config, train=replace(config.train, resume=None)))


def undo_early_stop(progress: Progress, patience: int) -> None:
    """Let an extended run continue. Validations without a better loss still count if the new patience is above their
    number, and are counted anew otherwise."""
    if 0 < patience <= progress.evals_since_best:
        progress.evals_since_best = 0
    progress.early_stopped = False


def how_to_extend(config: Config) -> str:
    """The line for a run that has ended and is resumed without new options."""
    options = config.train
    length = f"--epochs above {options.epochs:g}" if options.steps is None else f"--steps above {options.steps}"
    return (f"{config.mode}: this run has ended: train.py --resume {config.root} continues it with {length}, or, if it "
            f"stopped early, with --patience above {options.patience}")
