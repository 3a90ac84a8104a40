"""Fine-tune GPT-2 on prompt-completion pairs: full, selective, LoRA, soft prompt or adapters, in one script.

    python train.py                                   tune the embedded base on the embedded pairs, with LoRA
    python train.py --mode all                        every mode on the same rows, and one table
    python train.py --model gpt2 --data my.jsonl      GPT-2 on your own pairs
    python train.py --adapter DIR                     start from a run's tuned parameters, or from PEFT's
    python train.py --mode all --lr auto --seeds 3    search each mode's learning rate, then repeat with three seeds
    torchrun --nproc-per-node 2 train.py ...          on two GPUs; --shard if one cannot hold the model

A flag with [,...] also takes a comma list. Each value is tried, with several lists each combination. The run with the
lowest validation loss is kept and scored.

It reads from top to bottom: options, base and data, then for each mode the search, and for each seed build, train and
score, then the table. The loop never asks which mode it is in: a mode (minift/modes/) decides which modules
are added and which parameters train. Only these go to the optimizer and into the saved file.
"""

from minift.quick_help import exit_with_help, train_parser

if __name__ == "__main__":
    exit_with_help(train_parser)  # before the imports below, since torch's takes more than a second

import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from minift import modes, ops, plan
from minift.data import dataset
from minift.data.quality import Facts
from minift.data.row_store import Examples
from minift.device import (
    choose_device,
    choose_dtype,
    compiled_code_bytes,
    configure_process,
    dtype_name,
    reset_peak_memory,
    resident_memory,
)
from minift.distributed import all_sum, processes, replicate, seed_step
from minift.errors import TrainingFailed, UserError, run_script
from minift.files import checkpoint, weights
from minift.files.atomic import write_json
from minift.files.checkpoint import Progress
from minift.files.weights import Base
from minift.graphs import check_graphs, make_graphs
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.progress import bad_step, check_learned, init_or_resume, run_metadata, validate
from minift.report import compare, metrics, test_rows
from minift.report.display import Display, TrainingView
from minift.report.result import make_result, progress_facts, scores_line, summary
from minift.report.trials_table import trials_table
from minift.run import config as configuration
from minift.run.config import Config, TrainOptions
from minift.run.extend import extend, how_to_extend
from minift.run.folder import COMPARE, MetricsLog, StopSignals, check_outside, choose_folder, finished, open_folder
from minift.training import (
    PendingSteps,
    apply_step,
    build,
    build_on_meta,
    count_totals,
    iterate_steps,
    largest_batch,
    learning_rate,
    make_optimizer,
    total_steps,
    train_step,
    untouched_base,
)
from minift.trials import (
    Trials,
    average,
    describe_seeds,
    expected_trainings,
    expected_trials,
    has_all_seeds,
    repetitions,
)

Rows = dict[str, Examples]  # {"train": ..., "val": ..., "test": ...}


@processes()
def main(arguments: list[str]) -> None:
    # options: one configuration for each mode; they differ in the mode and its defaults alone
    configs = configuration.parse(arguments, __doc__)
    options, is_comparison = configs[0].train, len(configs) > 1
    ops.plain = options.ops == "plain"
    configure_process()
    if options.plan:
        print(plan.report(configs))
        return

    # base and data: loaded once, for all runs
    base = load_base(options)
    # checks the options of every mode, and of a search every value
    meta_models = [build_on_meta(base, setting) for config in configs for setting in config.settings]
    check_adapter(configs[0], base)
    check_graphs(options, base.model.config)
    reserved = max(model.prompt_tokens for model in meta_models)
    rows, data_quality = load_rows(configs[0], base, reserved)
    if not rows["val"] and any(config.search for config in configs):
        raise UserError("a search chooses by the validation loss, and there are no validation rows: add some, or give "
                        "each option one value")
    general_rows = load_general_rows(options, base, reserved)
    if options.max_new_tokens is None:
        room = base.model.config.n_positions - reserved
        limit = metrics.choose_max_new_tokens(rows, base.eos_token_id, room)
        configs = [config.changed(max_new_tokens=limit) for config in configs]
        options = configs[0].train

    # each mode: the search, then a run for each seed
    out = choose_folder(options.out, options.mode)
    configs = [replace(config, root=out) for config in configs]
    folders = [out / config.mode if is_comparison else out for config in configs]
    if options.overwrite:
        check_outside(out, {"--data": configs[0].data.data, "--model": options.model, "--general": options.general,
                            "--adapter": options.adapter})
    task = Task(options, base, rows, data_quality, general_rows, Display(*expected_trainings(configs)))
    with open_folder(out, options.overwrite, resume=options.resume is not None):
        if not options.resume:
            write_configs(out, configs, folders)
        elif configs[0].extended:
            runs = [(run, folder, run_metadata(run, base, rows))
                    for pair in zip(configs, folders, strict=True) for run, folder in repetitions(*pair)]
            extend(runs, total_steps(len(rows["train"]), options))
        results = []
        for config, folder in zip(configs, folders, strict=True):
            print(configuration.describe(config))
            result = finished(folder) if options.resume and (is_comparison or options.seeds > 1) else None
            if result is not None and has_all_seeds(result, config):
                print(how_to_extend(config))
                task.display.skip(expected_trainings([config])[0])
            else:
                config = search(config, task, folder)
                result = repeat(config, task, folder) if options.seeds > 1 else tune(config, task, folder)
            results.append(result)

        # the table
        if is_comparison:
            print("\n" + compare.write(out, results))
            return
    print(f"next: python eval.py {out} --prompt TEXT, or the same on your own pairs: "
          f"python train.py --mode {configs[0].mode} --model gpt2 --data YOUR.jsonl")


def load_base(options: TrainOptions) -> Base:
    base = weights.with_eos(weights.load(options.model), options.eos)
    device = choose_device(options.device)
    dtype = dtype_name(choose_dtype(options.dtype, device))
    print(f"base {base.folder}: {count(base.model):,} parameters, on {device} in {dtype}")
    for note in base.notes:
        print(f"  {note}")
    if base.tokenizer is None:
        raise UserError(f"{base.folder} has no tokenizer: put tokenizer.json, or vocab.json and merges.txt, there")
    return base


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_adapter(config: Config, base: Base) -> None:
    """Refuse an --adapter that was tuned on another base."""
    if config.adapter is not None:
        expected = {"base": base.name, "fingerprint": base.fingerprint}
        checkpoint.check_tuned_belongs(config.adapter, expected)


def load_rows(config: Config, base: Base, reserved: int) -> tuple[Rows, Facts]:
    """The rows of the three splits as tokens, with room for `reserved` positions in front of each; and facts on the
    quality of the training rows."""
    options = config.train
    room = base.model.config.n_positions - reserved
    eos = weights.required_eos(base)
    rows, lines, facts = dataset.load_examples(config.data, options.seed, base.tokenizer, eos, room, options.row_limits)
    if not rows["val"]:
        lines.append("without validation rows there is no validation loss, no early stopping and no choice of the best "
                     "parameters: those of the last step are kept")
    if not rows["test"]:
        lines.append("without test rows there are no scores but forgetting and cost")
    print("\n".join(f"  {line}" for line in lines))
    return rows, facts


def load_general_rows(options: TrainOptions, base: Base, reserved: int) -> list[Row] | None:
    """The text of --general, outside the task, on which forgetting is measured."""
    if options.general is None:
        return None
    return metrics.load_general_rows(options.general, base.tokenizer, base.model.config.n_positions, reserved)


def write_configs(out: Path, configs: list[Config], folders: list[Path]) -> None:
    if len(configs) > 1:
        compare.write_modes(out / COMPARE, [config.mode for config in configs])  # --resume reads it
    for config, folder in zip(configs, folders, strict=True):
        configuration.save(folder, config)


@dataclass
class Task:
    """The options, the base and the rows, which all runs of a command share."""

    options: TrainOptions
    base: Base
    rows: Rows
    data_quality: Facts
    general_rows: list[Row] | None
    display: Display
    has_trained: bool = False  # in this process, so that code compiled for it is in memory

    def score(self, model: GPT) -> dict[str, Any]:
        """The scores of a model on the test rows."""
        return metrics.score(model, self.base.tokenizer, self.base.eos_token_id, self.rows["test"], self.options.batch,
                             self.options.max_new_tokens, self.general_rows)

    @cached_property
    def base_scores(self) -> dict[str, Any]:
        """Those of the untouched base. Computed at the first use, after a training, so that training begins at once."""
        return self.score(untouched_base(self.base, self.options))


def search(config: Config, task: Task, folder: Path) -> Config:
    """Train with each setting of a search, without scores. Returns the one with the lowest validation loss, whose run
    is then in `folder`; without a search, `config` itself."""
    trials = Trials(config, folder)
    task.display.skip(len(trials.lines))  # those before an interruption
    while (trial := trials.next()) is not None:
        reset_peak_memory(choose_device(config.train.device))
        try:
            # no name for the model, so that it is freed before the next one is built
            progress = train(build(task.base, trial.config), trial.config, task, trial.folder)
            outcome = trials.tell(progress)
        except TrainingFailed as error:
            outcome = trials.tell_failure(error)
        task.display.report(trial.config, outcome)
    chosen = trials.keep_best()
    task.display.expect(len(trials.lines) - expected_trials(config))
    if trials.lines:
        print("\n" + trials_table([(config.mode, line) for line in trials.lines]))
    return chosen


def repeat(config: Config, task: Task, folder: Path) -> dict[str, Any]:
    """The run with each seed. Returns the result with means and standard deviations, which is in `folder`."""
    runs = repetitions(config, folder)
    results = []
    for run, run_folder in runs:
        result = finished(run_folder)
        if result is None:
            result = tune(run, task, run_folder)
        elif run.part or not config.search:  # the first run of a search is one of its trials, which are counted
            task.display.skip(1)
        results.append(result)
    result = average(results, [run.train.seed for run, _ in runs])
    write_json(folder / "result.json", result)
    print(describe_seeds(result))
    return result


def tune(config: Config, task: Task, folder: Path) -> dict[str, Any]:
    """One run, from the untouched base to scores. Returns the content of its result.json."""
    options, base, rows, started = config.train, task.base, task.rows, time.perf_counter()
    if config.part:  # a repetition has a folder of its own
        configuration.save(folder, config)
    memory = memory_before(options)
    compiles = not task.has_trained  # later runs of a process find most of oneDNN's code compiled
    total = count(base.model)
    model = build(base, config)
    trainable = sum(parameter.numel() for parameter in modes.tuned_parameters(model).values())
    if not config.part:
        print(f"\n{config.mode}: {trainable:,} parameters train, {trainable / total:.2%} of the base's {total:,}")

    progress = train(model, config, task, folder)

    scores = task.score(model)
    facts = progress_facts(progress, folder) | {
        "mode": config.mode, "base": options.model, "learning_rate": options.lr,
        "trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total,
        "tuned_bytes": checkpoint.tuned_bytes(folder),
        "predicted_peak_bytes": predict_peak(config, task, memory, compiles),
        "seconds": time.perf_counter() - started, "data_quality": task.data_quality}
    result = make_result(facts, scores, task.base_scores)
    test_rows.write(folder, scores, task.base_scores)
    write_json(folder / "result.json", result)
    if config.part:
        task.display.report(config, scores_line(result))
    else:
        print(summary(result, scores, task.base_scores, rows["test"], options.max_new_tokens))
    return result


def memory_before(options: TrainOptions) -> int:
    """The memory of the process before a run, in bytes."""
    import torch._dynamo  # noqa: F401  torch's optimizers import it, which takes 140 MB and 2 s: a part of every run
    device = choose_device(options.device)
    reset_peak_memory(device)  # gives freed memory back, which would count
    return resident_memory(device)


def predict_peak(config: Config, task: Task, memory: int, compiles: bool) -> int | None:
    """The plan's prediction of the peak memory in bytes, with `memory` before the run; `compiles`: the run compiles
    oneDNN's code. Called after the training, which then begins some seconds earlier. None for a repetition, and with
    --shard: the plan knows a process that holds the whole model."""
    options, rows = config.train, task.rows["train"]
    if config.part or options.shard:
        return None
    cost = plan.predict(config, build_on_meta(task.base, config), largest_batch(rows, options))
    peak = memory + cost["predicted_peak_bytes"]
    if compiles:
        device = choose_device(options.device)
        peak += compiled_code_bytes(device, choose_dtype(options.dtype, device), count_totals(rows, options))
    return peak


def train(model: GPT, config: Config, task: Task, folder: Path) -> Progress:
    """The training loop. Leaves the model with its best parameters, which are also in the run's tuned file."""
    options, rows = config.train, task.rows
    steps = total_steps(len(rows["train"]), options)
    eval_every = options.eval_every or max(1, steps // 10)
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    metadata = run_metadata(config, task.base, rows)
    tuned = modes.tuned_parameters(model)
    initial = checkpoint.checksum(tuned, {})
    progress = init_or_resume(model, config, rows, folder, metadata, optimizer)
    replica = replicate(model)
    graphs = make_graphs(model, optimizer, options, tuned.values())  # CUDA graphs of the steps, or None
    view = TrainingView(task.display, config, folder, steps, progress)
    pending = PendingSteps(model.device)
    stop = 0
    model.train()
    with StopSignals() as signals, MetricsLog(folder, progress.step) as log, view:
        if progress.step == 0:  # the start is the first candidate for the best parameters
            val_loss = validate(model, rows["val"], config, folder, metadata, progress)
            log.write(step=0, train_loss=None, val_loss=val_loss)
            view.validation(progress, val_loss)
        for micro_batches in iterate_steps(rows["train"], options, progress.step):
            if progress.step >= steps or progress.early_stopped:
                break
            pending.start_clock()
            begun = progress.step + len(pending)  # the steps before this one
            lr = learning_rate(begun, steps, options)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed_step(options.seed, begun)
            if graphs:
                result = graphs.step(micro_batches)
            else:
                result = train_step(model, micro_batches, options.clip, replica, tuned.values())
                apply_step(optimizer, result)
            pending.add(micro_batches, lr, result)

            validates = (begun + 1) % eval_every == 0 or begun + 1 == steps
            while step := pending.read(wait=validates or stop > 0):
                loss, stop = all_sum(step.loss, signals.received)
                if not math.isfinite(loss) or not math.isfinite(step.grad_norm):
                    raise bad_step(model, loss, step.micro_batches, progress.step + 1, folder, options.seed, replica)
                progress.add_step(loss, step.tokens, step.seconds)
                log.write(step=progress.step, loss=loss, lr=step.lr, grad_norm=step.grad_norm, tokens=step.tokens,
                          seconds=step.seconds)
                view.step(progress, loss, step.lr)

            if validates:
                val_loss = validate(model, rows["val"], config, folder, metadata, progress)
                log.write(step=progress.step, train_loss=progress.train_loss, val_loss=val_loss)
                view.validation(progress, val_loss, lr)
            if validates or stop:
                checkpoint.save_last(folder, model, metadata, optimizer, progress)
                view.draw()
                (stop,) = all_sum(signals.received)  # a signal may have come meanwhile
            if stop:
                print(f"stopped after step {progress.step}; python train.py --resume {config.root} continues from "
                      "there")
                sys.exit(128 + (signals.received or signal.SIGTERM))
    check_learned(model, initial, folder)
    task.has_trained = True
    view.end(progress)
    checkpoint.load_best(folder, model)
    return progress


if __name__ == "__main__":
    run_script(main)
