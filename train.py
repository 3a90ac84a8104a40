"""Fine-tune GPT-2 on prompt-completion pairs: full, selective, LoRA, soft prompt or adapters, in one script.

    python train.py                                   tune the embedded base on the embedded pairs, with LoRA
    python train.py --mode all                        every mode on the same rows, and one table
    python train.py --model gpt2 --data my.jsonl      GPT-2 on your own pairs
    python train.py --adapter DIR                     start from a run's tuned parameters, or from PEFT's
    torchrun --nproc-per-node 2 train.py ...          on two GPUs; --shard if one cannot hold the model

It reads from top to bottom: options, base and data, then for each mode plan, build, train and score, then the table.
The loop never asks which mode it is in: a mode (minift/modes/) decides which modules are added and which parameters
train. Only these go to the optimizer and into the saved file.
"""

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from minift import modes, ops, plan
from minift.data import dataset
from minift.data.tokens import Example
from minift.device import (
    choose_device,
    choose_dtype,
    configure_process,
    peak_memory,
    reset_peak_memory,
    resident_memory,
)
from minift.distributed import all_sum, processes, replicate, seed_step
from minift.errors import UserError, run_script
from minift.files import checkpoint, weights
from minift.files.atomic import write_json
from minift.files.checkpoint import Progress
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.report import compare, metrics
from minift.report.plot import LiveCurves
from minift.report.result import make_result, progress_facts, summary
from minift.run import config as configuration
from minift.run.config import Config, TrainOptions
from minift.run.extend import extend, how_to_extend, resumable
from minift.run.folder import COMPARE, MetricsLog, StopSignals, choose_folder, finished, open_folder
from minift.training import (
    bad_step,
    build,
    build_on_meta,
    init_or_resume,
    iterate_steps,
    largest_batch,
    learning_rate,
    make_optimizer,
    run_metadata,
    status,
    total_steps,
    train_step,
    untouched_base,
    validate,
)

Rows = dict[str, list[Example]]  # {"train": ..., "val": ..., "test": ...}


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

    # base and data: loaded once, for all modes
    base = load_base(options)
    meta_models = [build_on_meta(base, config) for config in configs]  # checks the options of every mode
    check_adapter(configs[0], base)
    reserved = max(model.prompt_tokens for model in meta_models)
    rows = load_rows(configs[0], base, reserved)
    general_rows = load_general_rows(options, base, reserved)
    if options.max_new_tokens is None:
        room = base.model.config.n_positions - reserved
        limit = metrics.choose_max_new_tokens(rows, base.eos_token_id, room)
        configs = [config.changed(max_new_tokens=limit) for config in configs]
        options = configs[0].train

    # each mode: plan, build, train, score
    out = choose_folder(options.out, options.mode)
    folders = [out / config.mode if is_comparison else out for config in configs]
    with open_folder(out, options.overwrite, resume=options.resume is not None):
        if not options.resume:
            write_configs(out, configs, folders)
        elif configs[0].extended:
            extend(configs, folders, total_steps(len(rows["train"]), options))
        results, base_scores = [], None
        for config, meta_model, folder in zip(configs, meta_models, folders, strict=True):
            print(configuration.describe(config))
            result = finished(folder) if is_comparison and options.resume else None
            if result is not None:
                print(how_to_extend(config, out))
            else:
                facts, scores = tune(config, base, meta_model, rows, general_rows, folder)
                if base_scores is None:  # after the first run, so that training begins at once
                    base_scores = score(untouched_base(base, options), base, rows, options, general_rows)
                result = make_result(facts, scores, base_scores)
                write_json(folder / "result.json", result)
                print(summary(result, scores, base_scores, rows["test"], options.max_new_tokens))
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
    dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
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


def load_rows(config: Config, base: Base, reserved: int) -> Rows:
    """The rows of the three splits as tokens, with room for `reserved` positions in front of each."""
    options = config.train
    limits = {"train": None, "val": options.val_rows, "test": options.test_rows}
    room = base.model.config.n_positions - reserved
    eos = weights.required_eos(base)
    rows, lines = dataset.load_examples(config.data, options.seed, base.tokenizer, eos, room, limits)
    if not rows["val"]:
        lines.append("without validation rows there is no validation loss, no early stopping and no choice of the best "
                     "parameters: those of the last step are kept")
    if not rows["test"]:
        lines.append("without test rows there are no scores but forgetting and cost")
    print("\n".join(f"  {line}" for line in lines))
    return rows


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


def tune(config: Config, base: Base, meta_model: GPT, rows: Rows, general_rows: list[Row] | None,
         folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One mode, from the untouched base to scores. Returns facts of the run for result.json, and the scores."""
    options, started = config.train, time.perf_counter()
    device = choose_device(options.device)

    cost = plan.predict(config, meta_model, largest_batch(rows["train"], options))
    reset_peak_memory(device)
    predicted_peak = cost["predicted_peak_bytes"] + resident_memory(device)
    if options.shard:
        predicted_peak = None  # the plan knows a process that holds the whole model

    total = count(base.model)
    model = build(base, config)
    trainable = sum(parameter.numel() for parameter in modes.tuned_parameters(model).values())
    print(f"\n{config.mode}: {trainable:,} parameters train, {trainable / total:.2%} of the base's {total:,}")

    progress = train(model, config, base, rows, folder)
    peak = peak_memory(device)

    scores = score(model, base, rows, options, general_rows)
    facts = progress_facts(progress) | {
        "mode": config.mode, "base": options.model, "learning_rate": options.lr,
        "trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total,
        "tuned_bytes": checkpoint.tuned_bytes(folder), "peak_memory_bytes": peak,
        "predicted_peak_bytes": predicted_peak, "seconds": time.perf_counter() - started}
    return facts, scores


def score(model: GPT, base: Base, rows: Rows, options: TrainOptions, general_rows: list[Row] | None) -> dict[str, Any]:
    """The scores of a model on the test rows."""
    return metrics.score(model, base.tokenizer, base.eos_token_id, rows["test"], options.batch,
                         options.max_new_tokens, general_rows)


def train(model: GPT, config: Config, base: Base, rows: Rows, folder: Path) -> Progress:
    """The training loop. Leaves the model with its best parameters, which are also in the run's tuned file."""
    options = config.train
    steps = total_steps(len(rows["train"]), options)
    eval_every = options.eval_every or max(1, steps // 10)
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    metadata = run_metadata(config, base, rows)
    initial = checkpoint.checksum(modes.tuned_parameters(model), {})
    progress = init_or_resume(model, config, rows, folder, metadata, optimizer)
    replica = replicate(model)
    curves = LiveCurves(folder)
    bar = tqdm(total=steps, initial=progress.step, desc=config.mode, unit="step", file=sys.stdout,
               disable=not sys.stdout.isatty())
    model.train()
    with StopSignals() as signals, MetricsLog(folder, progress.step) as log, bar:
        if progress.step == 0:  # the start is the first candidate for the best parameters
            val_loss = validate(model, rows["val"], options, folder, metadata, progress)
            log.write(step=0, train_loss=None, val_loss=val_loss)
            bar.write(status(config.mode, progress, steps, val_loss), file=sys.stdout)
        for micro_batches in iterate_steps(rows["train"], options, progress.step):
            if progress.step >= steps or progress.early_stopped:
                break
            step_started = time.perf_counter()
            lr = learning_rate(progress.step, steps, options)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed_step(options.seed, progress.step)
            loss, grad_norm = train_step(model, micro_batches, options.clip, replica)
            loss, stop = all_sum(loss, signals.received)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise bad_step(model, loss, micro_batches, progress.step + 1, folder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            progress.window_loss += loss
            progress.window_steps += 1
            progress.tokens += sum(len(row.ids) for batch in micro_batches for row in batch)
            progress.seconds += time.perf_counter() - step_started
            speed = progress.tokens / progress.seconds
            log.write(step=progress.step, loss=loss, lr=lr, grad_norm=grad_norm)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{speed:.0f}")

            validated = progress.step % eval_every == 0 or progress.step == steps
            if validated:
                val_loss = validate(model, rows["val"], options, folder, metadata, progress)
                log.write(step=progress.step, train_loss=progress.train_loss, val_loss=val_loss)
                bar.write(status(config.mode, progress, steps, val_loss, lr), file=sys.stdout)
            if validated or stop:
                checkpoint.save_last(folder, model, metadata, optimizer, progress)
                curves.draw()
            if stop:
                print(f"stopped after step {progress.step}; python train.py --resume {resumable(config, folder)} "
                      "continues from there")
                sys.exit(128 + (signals.received or signal.SIGTERM))
    if progress.early_stopped:
        print(f"{config.mode}: stopped early, {options.patience} validations without a better loss")
    curves.draw(is_last=True)
    if checkpoint.checksum(modes.tuned_parameters(model), {}) == initial:
        raise UserError(f"{folder}: the tuned parameters equal their initial values, nothing was learned: raise --lr "
                        "or --steps")
    if progress.best_step == 0:
        print(f"{config.mode} did not beat its start: no validation after step 0 had a lower loss than "
              f"{progress.best_val_loss:.4f}, and the parameters of step 0 are kept: try another --lr or more --steps")
    checkpoint.load_best(folder, model)
    return progress


if __name__ == "__main__":
    run_script(main)
