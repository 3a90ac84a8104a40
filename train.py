"""Fine-tune GPT-2 on prompt-completion pairs: full, selective, LoRA, soft prompt or adapters, in one script.

    python train.py                                   tune the embedded base on the embedded pairs, with LoRA
    python train.py --mode all                        every mode on the same rows, and one table
    python train.py --model gpt2 --data my.jsonl      GPT-2 on your own pairs
    python train.py --adapter DIR                     go on from a run's tuned parameters, or from PEFT's
    torchrun --nproc-per-node 2 train.py ...          on two GPUs; --shard if one cannot hold the model

It reads from top to bottom: options, one training run, scores, main. The loop never asks which mode it is in:
a mode (minift/modes/) decides what is injected and what trains, and whatever trains is what the optimizer
gets and a run saves.
"""

import contextlib
import functools
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minift import distributed as parallel
from minift import modes, plan
from minift.data import dataset as data
from minift.data.dataset import Example
from minift.device import choose_device, choose_dtype, peak_memory, reset_peak_memory, resident_memory
from minift.errors import UserError, run_script
from minift.files import checkpoint, weights
from minift.files.checkpoint import Progress
from minift.model.gpt import GPT
from minift.ops.lora import choose_kernel
from minift.report import compare, metrics
from minift.run import config
from minift.run import folder as run
from minift.run.config import Config, TrainOptions


def prepare(model: GPT, asked: Config) -> None:
    """Turn the untouched base into the model that a run trains."""
    modes.apply(model, asked.mode, asked.own)
    model.dropout, model.checkpoint = asked.train.model_dropout, asked.train.checkpoint
    device = choose_device(asked.train.device)
    model.set_compute_dtype(choose_dtype(asked.train.dtype, device))
    model.set_kernel(choose_kernel(asked.train.kernel, device))


def start(model: GPT, asked: Config) -> None:
    """Put what --adapter tuned into the prepared model, in place of the mode's fresh start."""
    _, _, tensors = checkpoint.read_tuned(Path(asked.train.adapter), model, asked.train.model)
    modes.load_tuned(model, tensors, asked.train.adapter)


def make_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on what trains: decay for matrices, none for biases, norms and the soft prompt."""
    tuned = modes.tuned_parameters(model).values()
    bare = set(model.prompt.parameters()) if model.prompt is not None else set()
    decayed = [p for p in tuned if p.dim() >= 2 and p not in bare]
    others = [p for p in tuned if p.dim() < 2 or p in bare]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = model.device.type != "mps"
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=fused)


def lr_factor(step: int, steps: int, schedule: str, warmup_ratio: float) -> float:
    """The share of the peak learning rate at a step (0 is the first): linear warm-up, then the schedule, down
    to 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def steps_per_epoch(examples: list[Example], options: TrainOptions) -> int:
    return math.ceil(math.ceil(len(examples) / options.batch) / options.accumulate)


def steps_from(examples: list[Example], options: TrainOptions, first: int) -> Iterator[list[list[Example]]]:
    """What each optimizer step learns from, without end, from step `first` on: up to `accumulate` batches of
    one epoch. An epoch's order depends on the seed and its number alone, so a run resumes at any step."""
    epoch, skipped = divmod(first, steps_per_epoch(examples, options))
    while True:
        batches = (data.file_batches(examples, options.batch) if options.order == "file" else
                   data.batches(examples, options.batch, options.seed, epoch))
        for i in range(skipped * options.accumulate, len(batches), options.accumulate):
            yield batches[i : i + options.accumulate]
        epoch, skipped = epoch + 1, 0


def total_steps(examples: list[Example], options: TrainOptions) -> int:
    if options.steps is not None:
        return options.steps
    return max(1, round(options.epochs * steps_per_epoch(examples, options)))


def widest_batch(examples: list[Example], options: TrainOptions) -> list[Example]:
    """The batch with the most positions in a whole run: it decides the run's peak of memory."""
    steps = itertools.islice(steps_from(examples, options, 0), total_steps(examples, options))
    return max((batch for step in steps for batch in step),
               key=lambda batch: len(batch) * max(len(e.ids) for e in batch))


def train_step(model: GPT, micro_batches: list[list[Example]], clip: float,
               replica: nn.Module | None = None) -> tuple[float, float]:
    """Gradients of one optimizer step; gives the loss in nats a target token, of this rank's rows, and the
    norm of the whole gradient before clipping. The loss is the sum over the target tokens of all
    micro-batches divided by their number, so 1 x 8 rows and 8 x 1 row are the same step, as are 2 x 4 on two
    ranks. `replica` comes from parallel.replicate."""
    targets_in_step = sum(len(e.ids) - e.n_prompt for batch in micro_batches for e in batch)
    loss_sum = 0.0
    for number, batch in enumerate(micro_batches, start=1):
        ids, targets, lengths = data.collate(parallel.share(batch), pad_id=0)
        with replica.no_sync() if replica and number < len(micro_batches) else contextlib.nullcontext():
            loss = (replica or model.loss)(ids.to(model.device), targets, lengths) / targets_in_step
            (loss * parallel.WORLD).backward()  # gradients are averaged over the ranks
        loss_sum += loss.item()
    tuned = modes.tuned_parameters(model).values()
    return loss_sum, nn.utils.clip_grad_norm_(tuned, clip or math.inf).item()


def refuse_step(model: GPT, loss: float, micro_batches: list[list[Example]], options: TrainOptions,
                progress: Progress, folder: Path) -> None:
    """A loss or gradient that is not finite: skip the step if --on-nan says so, else end the run and say
    where to look. The parameters are those of the last good step either way."""
    progress.skipped += 1
    if options.on_nan == "skip" and progress.skipped <= options.max_skips:
        tqdm.write(f"step {progress.step + 1} skipped: its loss is {loss}, or a gradient not finite",
                   file=sys.stdout)
        return
    tuned = modes.tuned_parameters(model)
    norms = {name: parallel.whole(p.grad).norm().item() for name, p in tuned.items() if p.grad is not None}
    worst = max(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf)
    rows = ", ".join(e.pair.where for batch in micro_batches for e in batch)
    last = folder / checkpoint.LAST
    safe = f"{last} is intact" if last.exists() else "nothing is saved yet"
    raise UserError(f"step {progress.step + 1}: the loss is {loss} and the largest gradient, of {worst}, "
                    f"has norm {norms[worst]} ({progress.skipped} such steps so far); rows: {rows}; {safe}; "
                    "lower --lr, look at these rows, or try --dtype fp32")


def validate(model: GPT, val: list[Example], options: TrainOptions, folder: Path, belongs: dict[str, str],
             progress: Progress) -> float:
    """The validation loss; keeps the parameters if it is the best so far, and decides on early stopping."""
    val_loss = metrics.measure_losses(model, val, options.batch).loss
    parallel.reshard(model)
    if not math.isfinite(val_loss):
        raise UserError(f"step {progress.step}: the validation loss is {val_loss}; what {folder} holds is "
                        "from before and intact: lower --lr")
    if progress.window_steps:
        progress.train_loss = progress.window_loss / progress.window_steps
    progress.window_loss, progress.window_steps = 0.0, 0
    progress.stale += 1
    if val_loss < progress.best_val_loss:
        progress.best_val_loss, progress.best_step, progress.stale = val_loss, progress.step, 0
        checkpoint.save_tuned(folder, model, belongs, progress)
    progress.stopped = 0 < options.patience <= progress.stale
    return val_loss


def begin(model: GPT, options: TrainOptions, val: list[Example], folder: Path, belongs: dict[str, str],
          optimizer: torch.optim.Optimizer) -> Progress:
    """A new run, saved before its first step, or the one to resume, as it was last saved."""
    saved = (checkpoint.LAST, checkpoint.TUNED, "metrics.jsonl")
    there = parallel.from_first(lambda: any((folder / name).exists() for name in saved))
    if not options.resume or not there:
        checkpoint.save_last(folder, model, belongs, optimizer, Progress())
        return Progress()
    progress = checkpoint.load_last(folder, model, belongs, optimizer)
    if progress.best_step and not parallel.from_first(lambda: checkpoint.best_is_whole(folder, belongs)):
        print(f"{folder / checkpoint.TUNED} is missing or damaged: the best parameters, of step "
              f"{progress.best_step}, are lost, and those of step {progress.step} take their place")
        progress.best_val_loss = math.inf
        validate(model, val, options, folder, belongs, progress)
    return progress


def train(model: GPT, asked: Config, rows: dict[str, list[Example]], folder: Path) -> Progress:
    """The loop. Leaves the model with its best parameters, which are also in the run's tuned.safetensors."""
    mode, options = asked.mode, asked.train
    steps = total_steps(rows["train"], options)
    eval_every = options.eval_every or max(1, steps // 10)
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    belongs = checkpoint.identity(model, mode, asked.own, options.model) | checkpoint.course(options, rows)
    if parallel.from_first(lambda: belongs) != belongs:
        raise UserError(f"rank {parallel.RANK} has other options, rows or weights than rank 0: give every "
                        "machine the same")
    start_sum = checkpoint.checksum(modes.tuned_parameters(model), {})
    progress = begin(model, options, rows["val"], folder, belongs, optimizer)
    replica = parallel.replicate(model)
    log = run.MetricsLog(folder, progress.step)
    bar = tqdm(total=steps, initial=progress.step, desc=mode, unit="step", file=sys.stdout,
               disable=not sys.stdout.isatty())
    model.train()
    with run.StopSignals() as signals, log, bar:
        for micro_batches in steps_from(rows["train"], options, progress.step):
            if progress.step >= steps or progress.stopped:
                break
            began = time.perf_counter()
            lr = options.lr * lr_factor(progress.step, steps, options.schedule, options.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            parallel.seed(options.seed, progress.step)
            loss, norm = train_step(model, micro_batches, options.clip, replica)
            loss, stop = parallel.total(loss, signals.received)
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                progress.window_loss += loss
                progress.window_steps += 1
            else:
                refuse_step(model, loss, micro_batches, options, progress, folder)
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += sum(len(e.ids) for batch in micro_batches for e in batch)
            progress.seconds += time.perf_counter() - began
            speed = progress.tokens / progress.seconds
            log.write(step=progress.step, loss=loss, lr=lr, grad_norm=norm)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{speed:.0f}")
            validated = progress.step % eval_every == 0 or progress.step == steps
            if validated:
                val_loss = validate(model, rows["val"], options, folder, belongs, progress)
                log.write(step=progress.step, train_loss=progress.train_loss, val_loss=val_loss)
                best = "  best" if progress.stale == 0 else ""
                bar.write(f"{mode} step {progress.step}/{steps}  train {progress.train_loss:.4f}  val "
                          f"{val_loss:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s{best}", file=sys.stdout)
            if validated or stop:
                checkpoint.save_last(folder, model, belongs, optimizer, progress)
            if stop:
                whole = folder if options.mode == mode else folder.parent  # a comparison goes on as one
                print(f"stopped after step {progress.step}; python train.py --resume {whole} goes on from "
                      "there")
                parallel.total(0)  # the first process that ends gets the others killed: all are done now
                sys.exit(128 + (signals.received or signal.SIGTERM))
    if progress.stopped:
        print(f"{mode}: stopped early, {options.patience} validations without a better loss")
    checkpoint.load_best(folder, model)
    if checkpoint.checksum(modes.tuned_parameters(model), {}) == start_sum:
        raise UserError(f"{folder}: the tuned parameters equal their start, nothing was learned: raise --lr "
                        "or --steps")
    return progress


def tune(asked: Config, shape: GPT, rows: dict[str, list[Example]], general: str | None,
         score_base: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """One run, from the untouched base to result.json; `score_base` gives the base's scores on the same rows,
    and `shape` is the base on the meta device."""
    mode, options = asked.mode, asked.train
    began, device = time.perf_counter(), choose_device(options.device)
    batch = widest_batch(rows["train"], options)
    planned = None  # with --shard: the plan knows a process that holds the whole model
    if not options.shard:
        planned = plan.predict(asked, shape, batch, prepare, make_optimizer, train_step)
    reset_peak_memory(device)
    predicted = planned and planned["predicted_peak_bytes"] + resident_memory(device)
    torch.manual_seed(options.seed)
    model = config.as_model(weights.load(options.model))
    total = sum(p.numel() for p in model.parameters())
    prepare(model, asked)
    if options.adapter and not parallel.from_first((folder / checkpoint.LAST).exists):
        start(model, asked)  # else the run's own parameters are there
    parallel.place(model, device, options.shard)
    trainable = sum(p.numel() for p in modes.tuned_parameters(model).values())
    print(f"\n{mode}: {trainable:,} parameters train, {trainable / total:.2%} of the base's {total:,}")
    progress = train(model, asked, rows, folder)
    peak = peak_memory(device)
    after = metrics.score(model, rows["test"], options.batch, options.max_new_tokens, general)
    seconds = time.perf_counter() - began  # before the base is scored, as only the first of several runs does
    del model
    before = score_base()
    result = {
        "mode": mode, "base": options.model, "learning_rate": options.lr, "steps": progress.step,
        "best_step": progress.best_step, "stopped_early": progress.stopped, "skipped_steps": progress.skipped,
        "trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total,
        "train_loss": progress.train_loss, "best_val_loss": progress.best_val_loss,
        "test_loss": after["loss"], "test_perplexity": after["perplexity"],
        **{name: after[name] for name in ("token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL")},
        "base_test_loss": before["loss"], "base_rougeL": before["rougeL"],
        "forgetting": after["general_loss"] - before["general_loss"] if general else None,
        "tuned_bytes": parallel.from_first(lambda: (folder / checkpoint.TUNED).stat().st_size),
        "peak_memory_bytes": peak, "predicted_peak_bytes": predicted,
        "tokens_per_second": progress.tokens / progress.seconds, "seconds": seconds}
    run.write_json(folder / "result.json", result)
    for example, old, new in zip(rows["test"][:3], before["completions"], after["completions"], strict=False):
        print(f"\n  {example.pair.where}   {example.pair.completion!r}\n  base   {old!r}\n  tuned  {new!r}")
    print(f"\n{mode}: test loss {before['loss']:.4f} -> {after['loss']:.4f}, ROUGE-L {before['rougeL']:.3f} "
          f"-> {after['rougeL']:.3f}, {compare.size(result['tuned_bytes'])} in {folder / checkpoint.TUNED}, "
          f"peak memory {compare.cell('peak_memory_bytes', peak)}, predicted "
          f"{compare.cell('predicted_peak_bytes', predicted)}")
    return result


@parallel.processes()
def main(arguments: list[str]) -> None:
    asked = config.parse(arguments, __doc__)  # one configuration for each mode
    first = next(iter(asked.values()))
    options, several = first.train, len(asked) > 1
    if options.plan:
        print(plan.report(asked, prepare, make_optimizer, train_step, widest_batch))
        return
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    base = config.as_model(weights.load(options.model))
    print(f"base {base.folder}: {sum(p.numel() for p in base.parameters()):,} parameters, on {device} in "
          f"{str(dtype).removeprefix('torch.')}")
    config.check_modes(asked, base)
    room = base.config.n_positions - max(one.prompt_tokens for one in asked.values())
    limits = {"train": None, "val": options.val_rows, "test": options.test_rows}
    rows, lines = data.load_examples(first.data, options.seed, base, room, limits)
    print("\n".join(f"  {line}" for line in lines))
    for name in limits:
        if not rows[name]:
            raise UserError(f"{first.data.data}: there are no {name} rows: give every split a share in "
                            "--split")
    general = data.read_text(options.general) if options.general else None
    if general is not None and len(data.tokenize(base.tokenizer, [general[:1000]])[0]) < 2:
        raise UserError(f"--general {options.general} holds fewer than two tokens: there is nothing to score")

    @functools.cache
    def score_base() -> dict[str, Any]:  # asked for when the first run is over: training begins at once
        untouched = config.as_model(weights.load(options.model))
        untouched.requires_grad_(False)
        untouched.set_compute_dtype(dtype)
        parallel.place(untouched, device, options.shard)
        return metrics.score(untouched, rows["test"], options.batch, options.max_new_tokens, general)

    out = parallel.from_first(lambda: Path(options.out) if options.out else
                              run.next_free(Path("runs") / options.mode.replace(",", "-")))
    folders = {mode: out / mode if several else out for mode in asked}
    goes_on = f"what {out} holds is intact, and train.py --resume {out} goes on from its last.safetensors"
    with run.open_folder(out, options.overwrite, resume=options.resume is not None), parallel.guard(goes_on):
        if several and not options.resume:
            run.write_json(out / "compare.json", [{"mode": mode} for mode in asked])  # what --resume goes by
        for mode, one in asked.items():
            print(config.describe(one))
            if not options.resume:
                config.save(folders[mode], one)
        shape = config.as_model(weights.load_on_meta(str(base.folder)))
        del base
        again = several and options.resume
        done = parallel.from_first(
            lambda: {mode: checkpoint.finished(folders[mode]) if again else None for mode in asked})
        results = [done[mode] or tune(one, shape, rows, general, score_base, folders[mode])
                   for mode, one in asked.items()]
        if several:
            print("\n" + compare.write(out, results))
            return
    print(f"next: python eval.py {out} --prompt TEXT, or the same on your own pairs: "
          f"python train.py --mode {first.mode} --model gpt2 --data YOUR.jsonl")


if __name__ == "__main__":
    run_script(main)
