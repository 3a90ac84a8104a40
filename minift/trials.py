"""Searches and repetitions: the runs that train.py makes of one configuration.

A search (--lr 1e-4,1e-3, --lr auto, --rank 4,8) has trials, in RUN/trials/. The one with the lowest validation loss
becomes the run. A trial that is far behind the best one before it stops early, see `stop_losses`. A repetition
(--seeds) is the same run with another seed, in RUN/seed-N/.
"""

import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minift.distributed import broadcast, is_main
from minift.errors import TrainingFailed, UserError
from minift.files.atomic import write_text
from minift.files.checkpoint import LAST, TUNED, Progress
from minift.progress import is_behind
from minift.report.trials_table import option_words
from minift.run import config as configuration
from minift.run.config import AUTO, Config
from minift.run.folder import TRIALS, read_metrics, read_trials

# A trial stops if it is more than BEHIND times as far above the best trial's final loss as that trial was at the same
# step. A distance of the best trial below this part of its final loss counts as that part.
BEHIND, LEAST_GAP = 3, 0.01
STOP_FROM, STOP_TO = 0.25, 0.6  # the parts of the steps between which a trial may stop
FURTHER = 4  # the most rates that --lr auto tries beside the first three
NICE = (1, 2, 3, 5, 7, 10)  # the digits of a rate of --lr auto
# the scores of which --seeds gives mean and standard deviation
REPEATED = ("test_loss", "test_perplexity", "token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL",
            "unsupported", "forgetting")


class Trial(NamedTuple):
    config: Config
    folder: Path
    options: dict[str, Any]  # those of the search
    best_before: dict[str, Any] | None  # the line of the trial that it is compared with while it trains


class Trials:
    """The trials of a search, one after another: `next` gives a trial, `tell` or `tell_failure` takes its outcome, and
    `keep_best` ends the search. Without a search there are none.

    The trials follow from the outcomes before them, which are in trials.jsonl, so a search resumes with the same ones.
    """

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self.lines = broadcast(lambda: read_trials(folder)) if config.search else []
        self.proposals = iter(()) if self.chosen() else self.propose()
        self.trial: Trial | None = None
        self.began = 0.0

    def chosen(self) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["chosen"]), None)

    def next(self) -> Trial | None:
        for options in self.proposals:
            if not self.line_of(options):
                self.trial, self.began = self.make_trial(options), time.perf_counter()
                return self.trial
        return None

    def make_trial(self, options: dict[str, Any]) -> Trial:
        """A trial is an ordinary run in a folder of its own."""
        config = self.config.with_options(options, "trial")
        best_before = self.best_before(options)
        config = replace(config, train=replace(config.train, resume=None, seeds=1), search={},
                         part=option_words(options), stop_losses=broadcast(lambda: self.read_stop_losses(best_before)))
        folder = self.folder_of(options)
        configuration.save(folder, config)
        return Trial(config, folder, options, best_before)

    def best_before(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """The best trial so far; for --lr auto, of those that differ in the rate alone, as they decide on the next
        rates."""
        others = [name for name in options if name != "lr"]
        lines = self.lines
        if self.config.search.get("lr") == AUTO:
            lines = [line for line in lines if all(line["options"][name] == options[name] for name in others)]
        return best_of(lines)

    def read_stop_losses(self, best_before: dict[str, Any] | None) -> dict[int, float]:
        """The limits for the next trial; none for the first one, or with --patience 0."""
        if best_before is None or self.config.train.patience == 0:
            return {}
        lines = read_metrics(self.folder_of(best_before["options"]))
        return stop_losses(best_before, {line["step"]: line["val_loss"] for line in lines if "val_loss" in line})

    def folder_of(self, options: dict[str, Any]) -> Path:
        return self.folder / "trials" / "-".join(f"{name}-{value}" for name, value in options.items())

    def line_of(self, options: dict[str, Any]) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["options"] == options), None)

    def tell(self, progress: Progress) -> str:
        """Note the outcome of the current trial, and return it in words."""
        outcome = {"steps": progress.step, "best_step": progress.best_step, "val_loss": progress.best_val_loss}
        if not is_behind(self.trial.config, progress):
            self.add_line(outcome)
            return f"validation loss {progress.best_val_loss:.4f} at step {progress.best_step} of {progress.step}"
        stopped = f"at step {progress.step}, behind {option_words(self.trial.best_before['options'])}"
        self.add_line(outcome | {"stopped": stopped})
        return f"stopped {stopped}, with validation loss {progress.best_val_loss:.4f}"

    def tell_failure(self, error: TrainingFailed) -> str:
        failure = str(error).partition(";")[0]  # the rest is about the trial's files, which are not kept
        self.add_line({"steps": None, "best_step": None, "val_loss": None, "failure": failure})
        return f"failed: {failure}"

    def add_line(self, outcome: dict[str, Any]) -> None:
        line = {"mode": self.config.mode, "options": self.trial.options, "seconds": time.perf_counter() - self.began,
                "chosen": False} | outcome
        # rank 0's, as decisions follow from the lines
        self.lines.append(broadcast(lambda: line))
        self.write()
        best = best_of(self.lines)
        for other in self.lines:
            if other is not best:
                remove_tensors(self.folder_of(other["options"]))

    def write(self) -> None:
        write_text(self.folder / TRIALS, "".join(json.dumps(line) + "\n" for line in self.lines))

    def keep_best(self) -> Config:
        """Choose the trial with the lowest validation loss. Its files become the run's own. Raises UserError if all
        trials failed."""
        if not self.config.search:
            return self.config
        best = self.chosen() or best_of(self.lines)
        if best is None:
            raise UserError(f"every trial failed, the last one so: {self.lines[-1]['failure']}; give other values")
        if not best["chosen"]:
            best["chosen"] = True
            self.write()
        config = self.config.with_options(best["options"], f"best validation loss of {len(self.lines)} trials")
        trial = self.folder_of(best["options"])
        if is_main() and (trial / LAST).exists():
            configuration.save(self.folder, replace(config, train=replace(config.train, resume=None)))
            for name in ("metrics.jsonl", TUNED, LAST):  # LAST last: until then, a resumed search does this again
                if (trial / name).exists():
                    os.replace(trial / name, self.folder / name)
            shutil.rmtree(trial)
        return config

    # ---- the settings to try

    def propose(self) -> Iterator[dict[str, Any]]:
        """The options of each trial, finished ones included: every combination of the lists, and for --lr auto some
        rates with each combination of the others."""
        for setting in self.config.settings:
            options = {name: setting.origins[name][0] for name, values in self.config.search.items() if values != AUTO}
            if self.config.search.get("lr") == AUTO:
                yield from self.propose_rates(options)
            elif options:
                yield options

    def propose_rates(self, others: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Three rates around the mode's default, then more in the better direction until the best one has a worse one
        on both sides."""
        default = self.config.train.lr

        def at(place: int) -> dict[str, Any]:
            return {"lr": nice(default * 10 ** (place / 2)) if place else default, **others}

        def loss(place: int) -> tuple[float, int]:
            return loss_of(self.line_of(at(place))), abs(place)  # of equal losses, the one nearest to the default

        yield from (at(0), at(-1), at(1))
        low, high = -1, 1
        for _ in range(FURTHER):
            best = min(range(low, high + 1), key=loss)
            if loss(best)[0] == math.inf:
                best = low  # all failed: the rates are too high
            if low < best < high:
                return
            if best == low:
                low -= 1
                yield at(low)
            else:
                high += 1
                yield at(high)


def best_of(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The trial with the lowest validation loss, of equal ones the first; None if all failed."""
    return min((line for line in lines if line["val_loss"] is not None), key=loss_of, default=None)


def stop_losses(best_before: dict[str, Any], val_losses: dict[int, float]) -> dict[int, float]:
    """{step: the loss above which another trial stops there}, from the validation losses of the best trial before it.

    A trial stops between a quarter and 60 % of its steps if its best loss so far is more than three times as far above
    the final loss of the best trial as that one was at the same step, where this distance counts as at least 1 % of
    that loss. Low and high rates are both behind early, by up to twice the distance, and may still win. If the best
    trial overfits (its best step is not its last), any rate may still win, and no trial stops. The idea to stop a trial
    by a comparison at the same step is from Golovin et al. 2017 (Vizier), section 3.2.
    """
    end, steps = best_before["val_loss"], best_before["steps"]
    if best_before["best_step"] < steps:
        return {}
    return {step: end + BEHIND * max(loss - end, LEAST_GAP * end) for step, loss in val_losses.items()
            if STOP_FROM * steps <= step <= STOP_TO * steps}


def nice(value: float) -> float:
    """The nearest of ..., 0.1, 0.2, 0.3, 0.5, 0.7, 1, ... on a logarithmic scale."""
    exponent = math.floor(math.log10(value))
    candidates = [float(f"{digit}e{exponent}") for digit in NICE]
    return min(candidates, key=lambda candidate: abs(math.log(candidate / value)))


def loss_of(line: dict[str, Any] | None) -> float:
    return math.inf if line is None or line["val_loss"] is None else line["val_loss"]


def remove_tensors(folder: Path) -> None:
    if is_main():
        for name in (TUNED, LAST):
            (folder / name).unlink(missing_ok=True)


def expected_trainings(configs: list[Config]) -> tuple[int, bool]:
    """The number of trainings of all configurations, and whether it is an estimate."""
    count, is_estimate = 0, False
    for config in configs:
        count += expected_trials(config) or 1
        count += config.train.seeds - 1
        is_estimate = is_estimate or AUTO in config.search.values()
    return count, is_estimate


def expected_trials(config: Config) -> int:
    if not config.search:
        return 0
    rates = 4 if AUTO in config.search.values() else 1  # three, and often one more
    return rates * len(config.settings)


# ---- --seeds

def repetitions(config: Config, folder: Path) -> list[tuple[Config, Path]]:
    """The runs of --seeds with their folders: that of `config` itself, and the same with the seeds after its own, on
    the same rows."""
    runs = [(config, folder)]
    first = config.train.seed
    split_seed = first if config.data.split_seed is None else config.data.split_seed
    for seed in range(first + 1, first + config.train.seeds):
        train = replace(config.train, seed=seed, seeds=1, resume=None)
        data = replace(config.data, split_seed=split_seed)
        origins = config.origins | {"seed": (seed, "--seeds"), "split_seed": (split_seed, "--seeds")}
        repetition = replace(config, train=train, data=data, origins=origins, search={}, part=f"seed {seed}")
        runs.append((repetition, folder / f"seed-{seed}"))
    return runs


def average(results: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """The result of several seeds: the first one's, with the mean over all of each score and, as NAME_std, the sample
    standard deviation. None where a run has no such score."""
    result = results[0] | {"seeds": seeds}
    for name in REPEATED:
        if name not in result:
            continue
        values = [each.get(name) for each in results]
        has_all = None not in values
        result[name] = statistics.fmean(values) if has_all else None
        result[f"{name}_std"] = statistics.stdev(values) if has_all and len(values) > 1 else None
    return result


def has_all_seeds(result: dict[str, Any], config: Config) -> bool:
    """Whether a result is that of all seeds, and not of the first one alone."""
    return len(result.get("seeds", [config.train.seed])) == config.train.seeds


def describe_seeds(result: dict[str, Any]) -> str:
    """The line of a repeated run: mean and standard deviation of its main scores."""
    names = {"test_loss": "test loss", "rougeL": "ROUGE-L", "forgetting": "forgetting"}
    parts = [f"{label} {result[name]:.4f} ± {result[f'{name}_std']:.4f}" for name, label in names.items()
             if result[name] is not None]
    return f"{result['mode']}: mean and standard deviation of {len(result['seeds'])} seeds: {', '.join(parts)}"
