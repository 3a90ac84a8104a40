"""Fine-tune GPT-2 on prompt-completion pairs: full, selective, LoRA, soft prompt or adapters, in one script.

    python train.py                                   tune the embedded base on the embedded pairs, with LoRA
    python train.py --mode all                        every mode on the same rows, and one table
    python train.py --model gpt2 --data my.jsonl      GPT-2 on your own pairs

It reads from top to bottom: options, one training run, scores, main. The loop never asks which mode it is in:
a mode (minift/modes/) decides what is injected and what trains, and whatever trains is what the optimizer
gets and a run saves.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minift import checkpoint, compare, config, data, metrics, modes, run, weights
from minift.checkpoint import Progress
from minift.config import Config, TrainOptions
from minift.data import Example
from minift.errors import UserError, run_script
from minift.machine import choose_device, choose_dtype, peak_memory, reset_peak_memory
from minift.model import GPT


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


def steps_from(examples: list[Example], options: TrainOptions, first: int) -> Iterator[list[list[Example]]]:
    """What each optimizer step learns from, without end, from step `first` on: up to `accumulate` batches of
    one epoch. An epoch's order depends on the seed and its number alone, so a run resumes at any step."""
    per_epoch = math.ceil(math.ceil(len(examples) / options.batch) / options.accumulate)
    epoch, skipped = divmod(first, per_epoch)
    while True:
        batches = (data.file_batches(examples, options.batch) if options.order == "file" else
                   data.batches(examples, options.batch, options.seed, epoch))
        for i in range(skipped * options.accumulate, len(batches), options.accumulate):
            yield batches[i : i + options.accumulate]
        epoch, skipped = epoch + 1, 0


def total_steps(examples: list[Example], options: TrainOptions) -> int:
    if options.steps is not None:
        return options.steps
    per_epoch = math.ceil(math.ceil(len(examples) / options.batch) / options.accumulate)
    return max(1, round(options.epochs * per_epoch))


def train_step(model: GPT, micro_batches: list[list[Example]], clip: float) -> tuple[float, float]:
    """Gradients of one optimizer step; gives the loss in nats a target token and the gradient's norm before
    clipping. The loss is the sum over the target tokens of all micro-batches divided by their number, so 1 x
    8 rows and 8 x 1 row are the same step."""
    targets_in_step = sum(len(e.ids) - e.n_prompt for batch in micro_batches for e in batch)
    loss_sum = 0.0
    for batch in micro_batches:
        ids, targets = data.collate(batch, pad_id=0)
        loss = model.loss(ids.to(model.device), targets) / targets_in_step
        loss.backward()
        loss_sum += loss.item()
    tuned = modes.tuned_parameters(model).values()
    return loss_sum, nn.utils.clip_grad_norm_(tuned, clip or math.inf).item()


def refuse_step(model: GPT, loss: float, micro_batches: list[list[Example]], options: TrainOptions,
                progress: Progress, folder: Path) -> None:
    """A loss or gradient that is not finite: skip the step if --on-nan says so, else end the run and say
    where to look. The parameters are those of the last good step either way."""
    progress.skipped += 1
    if options.on_nan == "skip" and progress.skipped <= options.max_skips:
        return
    tuned = modes.tuned_parameters(model)
    norms = {name: p.grad.norm().item() for name, p in tuned.items() if p.grad is not None}
    worst = max(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf)
    rows = ", ".join(e.pair.where for batch in micro_batches for e in batch)
    last = folder / checkpoint.LAST
    safe = f"{last} is intact" if last.exists() else "nothing is saved yet"
    raise UserError(f"step {progress.step + 1}: the loss is {loss} and the largest gradient, of {worst}, "
                    "has norm "
                    f"{norms[worst]} ({progress.skipped} such steps so far); rows: {rows}; {safe}; lower "
                    "--lr, "
                    "look at these rows, or try --dtype fp32")


def validate(model: GPT, val: list[Example], options: TrainOptions, folder: Path, belongs: dict[str, str],
             progress: Progress) -> float:
    """The validation loss; keeps the parameters if it is the best so far, and decides on early stopping."""
    val_loss = metrics.measure_losses(model, val, options.batch).loss
    progress.train_loss = progress.window_loss / max(1, progress.window_steps)
    progress.window_loss, progress.window_steps = 0.0, 0
    progress.stale += 1
    if val_loss < progress.best_val_loss:
        progress.best_val_loss, progress.best_step, progress.stale = val_loss, progress.step, 0
        checkpoint.save_tuned(folder, model, belongs, progress)
    progress.stopped = 0 < options.patience <= progress.stale
    return val_loss


def train(model: GPT, asked: Config, rows: dict[str, list[Example]], folder: Path) -> Progress:
    """The loop. Leaves the model with its best parameters, which are also in the run's tuned.safetensors."""
    mode, options = asked.mode, asked.train
    steps = total_steps(rows["train"], options)
    eval_every = options.eval_every or max(1, steps // 10)
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    belongs = checkpoint.identity(model, mode, asked.own, options.model)
    start_sum = checkpoint.checksum(modes.tuned_parameters(model), {})
    progress = checkpoint.load_last(folder, model, belongs, optimizer) if options.resume else Progress()
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
            loss, norm = train_step(model, micro_batches, options.clip)
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
            if validated or signals.received:
                checkpoint.save_last(folder, model, belongs, optimizer, progress)
            if signals.received:
                print(f"stopped after step {progress.step}; python train.py --resume {folder} goes on from "
                      "there")
                sys.exit(128 + signals.received)
    if progress.stopped:
        print(f"{mode}: stopped early, {options.patience} validations without a better loss")
    checkpoint.load_best(folder, model)
    if checkpoint.checksum(modes.tuned_parameters(model), {}) == start_sum:
        raise UserError(f"{folder}: the tuned parameters equal their start, nothing was learned: raise --lr "
                        "or "
                        "--steps")
    return progress


def tune(asked: Config, rows: dict[str, list[Example]], general: str | None, before: dict[str, Any],
         folder: Path) -> dict[str, Any]:
    """One run, from the untouched base to result.json; `before` are the base's scores on the same rows."""
    mode, options = asked.mode, asked.train
    began, device = time.perf_counter(), choose_device(options.device)
    reset_peak_memory(device)
    torch.manual_seed(options.seed)
    model = weights.load(options.model)
    total = sum(p.numel() for p in model.parameters())
    modes.apply(model, mode, asked.own)
    model.dropout, model.checkpoint = options.model_dropout, options.checkpoint
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    model.to(device)
    trainable = sum(p.numel() for p in modes.tuned_parameters(model).values())
    print(f"\n{mode}: {trainable:,} parameters train, {trainable / total:.2%} of the base's {total:,}")
    progress = train(model, asked, rows, folder)
    peak = peak_memory(device)
    after = metrics.score(model, rows["test"], options.batch, options.max_new_tokens, general)
    result = {
        "mode": mode, "base": options.model, "learning_rate": options.lr, "steps": progress.step,
        "best_step": progress.best_step, "stopped_early": progress.stopped, "skipped_steps": progress.skipped,
        "trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total,
        "train_loss": progress.train_loss, "best_val_loss": progress.best_val_loss,
        "test_loss": after["loss"], "test_perplexity": after["perplexity"],
        **{name: after[name] for name in ("token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL")},
        "base_test_loss": before["loss"], "base_rougeL": before["rougeL"],
        "forgetting": after["general_loss"] - before["general_loss"] if general else None,
        "tuned_bytes": (folder / checkpoint.TUNED).stat().st_size, "peak_memory_bytes": peak,
        "tokens_per_second": progress.tokens / progress.seconds, "seconds": time.perf_counter() - began}
    run.write_json(folder / "result.json", result)
    for example, old, new in zip(rows["test"][:3], before["completions"], after["completions"], strict=False):
        print(f"\n  {example.pair.where}   {example.pair.completion!r}\n  base   {old!r}\n  tuned  {new!r}")
    print(f"\n{mode}: test loss {before['loss']:.4f} -> {after['loss']:.4f}, ROUGE-L {before['rougeL']:.3f} "
          "-> "
          f"{after['rougeL']:.3f}, {compare.size(result['tuned_bytes'])} in {folder / checkpoint.TUNED}")
    return result


def main(arguments: list[str]) -> None:
    asked = config.parse(arguments, __doc__)  # one configuration for each mode
    first = next(iter(asked.values()))
    options, several = first.train, len(asked) > 1
    device = choose_device(options.device)
    base = weights.load(options.model)
    base.requires_grad_(False)
    base.set_compute_dtype(choose_dtype(options.dtype, device))
    base.to(device)
    print(f"base {base.folder}: {sum(p.numel() for p in base.parameters()):,} parameters, on {device} in "
          f"{str(base.compute_dtype).removeprefix('torch.')}")
    room = base.config.n_positions - max(one.prompt_tokens for one in asked.values())
    limits = {"train": None, "val": options.val_rows, "test": options.test_rows}
    rows, lines = data.load_examples(first.data, options.seed, base, room, limits)
    print("\n".join(f"  {line}" for line in lines))
    for name in limits:
        if not rows[name]:
            raise UserError(f"{first.data.data}: there are no {name} rows: give every split a share in "
                            "--split")
    general = data.read_text(options.general) if options.general else None

    out = Path(options.out) if options.out else run.next_free(Path("runs") / options.mode.replace(",", "-"))
    folders = {mode: out / mode if several else out for mode in asked}
    with run.open_folder(out, options.overwrite, resume=options.resume is not None):
        for mode, one in asked.items():
            folders[mode].mkdir(exist_ok=True)
            config.save(folders[mode], one)
            print(config.describe(one))
        before = metrics.score(base, rows["test"], options.batch, options.max_new_tokens, general)
        del base
        results = [tune(one, rows, general, before, folders[mode]) for mode, one in asked.items()]
        if several:
            print("\n" + compare.write(out, results))
            return
    print(f"next: python eval.py {out} --prompt TEXT, or the same on your own pairs: "
          f"python train.py --mode {first.mode} --model gpt2 --data YOUR.jsonl")


if __name__ == "__main__":
    run_script(main)
