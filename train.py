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
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minift import compare, data, metrics, modes, run, weights
from minift.data import DataOptions, Example
from minift.errors import UserError, run_script
from minift.machine import DEVICES, DTYPES, choose_device, choose_dtype, peak_memory, reset_peak_memory
from minift.model import GPT
from minift.options import Parser, add_options, flag, option, resolve

TINY = Path(__file__).parent / "data" / "tiny"  # the embedded base, its pairs and its general text


@dataclass(frozen=True)
class TrainOptions:
    mode: str = option("lora", f"how to tune: {', '.join(modes.MODES)}, a comma list of them, or all")
    model: str | None = option(None, "a folder's path, or gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                                     "distilgpt2 from the "
                                     "Hub (default: the embedded base)")
    out: str | None = option(None, "folder of the run (default: runs/MODE-1, runs/MODE-2, ...)")
    overwrite: bool = option(False, "replace the run that is in --out")
    epochs: float = option(3.0, "passes over the training rows")
    steps: int | None = option(None, "optimizer steps, instead of --epochs")
    batch: int = option(16, "rows in a forward pass")
    accumulate: int = option(1, "forward passes in an optimizer step; the loss is a mean over all their "
                                "target tokens")
    lr: float | None = option(None, "peak learning rate (default: the mode's)")
    weight_decay: float | None = option(None, "decay of matrices; biases, norms and soft prompts have none "
                                              "(default: "
                                              "the mode's)")
    schedule: str = option("cosine", "the learning rate after warm-up", ("cosine", "linear", "constant"))
    warmup_ratio: float = option(0.06, "share of the steps in which the learning rate rises from 0")
    clip: float = option(1.0, "largest norm of the whole gradient; 0 leaves it alone")
    model_dropout: float = option(0.0, "GPT-2's own dropout (embeddings, attention, residuals); "
                                       "config.json's is unused")
    eval_every: int | None = option(None, "steps between validations (default: ten validations a run)")
    patience: int = option(3, "validations without a better loss before the run stops; 0 never stops early")
    val_rows: int = option(200, "validate on the first N validation rows")
    test_rows: int = option(200, "score the first N test rows at the end")
    max_new_tokens: int = option(64, "length limit of generated completions")
    general: str | None = option(None, "a text file outside the task: its loss before and after is the "
                                       "forgetting")
    dtype: str = option("auto", "what to compute in; auto: bf16 where the hardware has it", DTYPES)
    device: str = option("auto", "where to compute", DEVICES)
    seed: int = option(0, "seed of everything random: split, order, initialisation, dropout")
    resume: str | None = option(None, "go on with the run in this folder, with the options it was started "
                                      "with")


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
        batches = data.batches(examples, options.batch, options.seed, epoch)
        for i in range(skipped * options.accumulate, len(batches), options.accumulate):
            yield batches[i : i + options.accumulate]
        epoch, skipped = epoch + 1, 0


def total_steps(examples: list[Example], options: TrainOptions) -> int:
    if options.steps is not None:
        return options.steps
    per_epoch = math.ceil(math.ceil(len(examples) / options.batch) / options.accumulate)
    return max(1, round(options.epochs * per_epoch))


def train_step(model: GPT, optimizer: torch.optim.Optimizer, micro_batches: list[list[Example]],
               clip: float) -> tuple[float, float]:
    """One optimizer step; gives the loss in nats a target token and the gradient's norm. The loss is the sum
    over the target tokens of all micro-batches divided by their number, so 1 x 8 rows and 8 x 1 row are the
    same step."""
    targets_in_step = sum(len(e.ids) - e.n_prompt for batch in micro_batches for e in batch)
    loss_sum = 0.0
    for batch in micro_batches:
        ids, targets = (t.to(model.device) for t in data.collate(batch, pad_id=0))
        loss = model.loss(ids, targets) / targets_in_step
        loss.backward()
        loss_sum += loss.item()
    tuned = modes.tuned_parameters(model).values()
    norm = nn.utils.clip_grad_norm_(tuned, clip if clip else math.inf).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, norm


def train(model: GPT, examples: list[Example], val: list[Example], options: TrainOptions, folder: Path,
          mode: str, mode_options: Any) -> run.Progress:
    """The loop. Leaves the model with its best weights, which are also in tuned.safetensors."""
    steps = total_steps(examples, options)
    eval_every = options.eval_every or max(1, steps // 10)
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    progress = run.load_last(folder, model, optimizer) if options.resume else run.Progress()
    log = run.MetricsLog(folder, progress.step)
    bar = tqdm(total=steps, initial=progress.step, desc=mode, unit="step", file=sys.stdout,
               disable=not sys.stdout.isatty())
    losses: list[float] = []
    model.train()
    for micro_batches in steps_from(examples, options, progress.step):
        if progress.step >= steps or progress.stopped:
            break
        start = time.perf_counter()
        lr = options.lr * lr_factor(progress.step, steps, options.schedule, options.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, norm = train_step(model, optimizer, micro_batches, options.clip)
        progress.step += 1
        progress.tokens += sum(len(e.ids) for batch in micro_batches for e in batch)
        progress.seconds += time.perf_counter() - start
        losses.append(loss)
        log.write(step=progress.step, loss=loss, lr=lr, grad_norm=norm)
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{progress.tokens / progress.seconds:.0f}")
        if progress.step % eval_every and progress.step != steps:
            continue

        val_loss = metrics.measure_losses(model, val, options.batch).loss
        progress.train_loss, losses = sum(losses) / len(losses), []
        progress.stale += 1
        if val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step, progress.stale = val_loss, progress.step, 0
            run.save_tuned(folder, model, mode, mode_options, options.model, progress)
        progress.stopped = options.patience > 0 and progress.stale >= options.patience
        log.write(step=progress.step, train_loss=progress.train_loss, val_loss=val_loss)
        run.save_last(folder, model, optimizer, progress)
        best = "  best" if progress.stale == 0 else ""
        bar.write(f"{mode} step {progress.step}/{steps}  train {progress.train_loss:.4f}  val "
                  f"{val_loss:.4f}  "
                  f"lr {lr:.1e}  {progress.tokens / progress.seconds:,.0f} tokens/s{best}", file=sys.stdout)
    bar.close()
    log.close()
    if progress.stopped:
        print(f"{mode}: stopped early, {options.patience} validations without a better loss")
    best_file = folder / "tuned.safetensors"
    modes.load_tuned(model, run.read_checked(best_file)[0], str(best_file))
    return progress


def tune(config: run.Config, rows: dict[str, list[Example]], general: str | None, before: dict[str, Any],
         folder: Path) -> dict[str, Any]:
    """One run, from the untouched base to result.json; `before` are the base's scores on the same rows and
    text."""
    mode, options = config.mode, config.train
    began = time.perf_counter()
    device = choose_device(options.device)
    reset_peak_memory(device)
    torch.manual_seed(options.seed)
    model = weights.load(options.model)
    total = sum(p.numel() for p in model.parameters())
    modes.apply(model, mode, config.own)
    model.dropout = options.model_dropout
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    model.to(device)
    trainable = sum(p.numel() for p in modes.tuned_parameters(model).values())
    print(f"\n{mode}: {trainable:,} parameters train, {trainable / total:.2%} of the base's {total:,}")
    progress = train(model, rows["train"], rows["val"], options, folder, mode, config.own)
    peak = peak_memory(device)
    after = metrics.score(model, rows["test"], options.batch, options.max_new_tokens, general)
    result = {
        "mode": mode, "base": options.model, "learning_rate": options.lr, "steps": progress.step,
        "best_step": progress.best_step, "stopped_early": progress.stopped, "trainable_parameters": trainable,
        "total_parameters": total, "trainable_share": trainable / total, "train_loss": progress.train_loss,
        "best_val_loss": progress.best_val_loss,
        "test_loss": after["loss"], "test_perplexity": after["perplexity"],
        **{name: after[name] for name in ("token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL")},
        "base_test_loss": before["loss"], "base_rougeL": before["rougeL"],
        "forgetting": after["general_loss"] - before["general_loss"] if general else None,
        "tuned_bytes": (folder / "tuned.safetensors").stat().st_size, "peak_memory_bytes": peak,
        "tokens_per_second": progress.tokens / progress.seconds, "seconds": time.perf_counter() - began}
    run.write_json(folder / "result.json", result)
    shown = zip(rows["test"][:3], before["completions"], after["completions"], strict=False)
    for example, old, new in shown:
        print(f"\n  {example.pair.where}   {example.pair.completion.strip()!r}\n  base   {old!r}\n  tuned  "
              f"{new!r}")
    print(f"\n{mode}: test loss {before['loss']:.4f} -> {after['loss']:.4f}, ROUGE-L {before['rougeL']:.3f} "
          "-> "
          f"{after['rougeL']:.3f}, {compare.size(result['tuned_bytes'])} in {folder / 'tuned.safetensors'}")
    return result


def parse(arguments: list[str]) -> dict[str, run.Config]:
    """The command line as one resolved configuration for each mode to run."""
    parser = Parser(prog="train.py", description=__doc__)
    add_options(parser, "training", TrainOptions)
    add_options(parser, "data", DataOptions)
    for name, module in modes.MODES.items():
        add_options(parser, f"mode {name}", module.Options)
    args = parser.parse_args(arguments)
    if args.resume:
        given = {name for name, value in vars(args).items() if value is not None and value is not False}
        others = sorted(given - {"resume", "debug"})
        if others:
            raise UserError(f"--resume goes on with the options that the run was started with: leave out "
                            f"{flag(others[0])}")
        config = run.load_config(Path(args.resume), TrainOptions)
        resumed = replace(config.train, resume=args.resume, out=args.resume)
        return {config.mode: replace(config, train=resumed)}

    chosen = list(modes.MODES) if args.mode == "all" else (args.mode or TrainOptions.mode).split(",")
    for mode in chosen:
        if mode not in modes.MODES or chosen.count(mode) > 1:
            raise UserError(f"--mode {args.mode}: {mode!r} is not a mode, or stands there twice; there are "
                            f"{', '.join(modes.MODES)}, and all")
    for mode in modes.MODES.keys() - chosen:
        for field in fields(modes.MODES[mode].Options):
            if getattr(args, field.name) is not None:
                raise UserError(f"{flag(field.name)} belongs to mode {mode}, and this run is "
                                f"{', '.join(chosen)}: "
                                "leave it out or change --mode")
    if args.model and not args.data:
        raise UserError("--model needs --data FILE_OR_FOLDER: the embedded pairs belong to the embedded base")
    embedded = {"data": (str(TINY / "pairs"), "embedded")}
    if not args.model:
        embedded |= {"model": (str(TINY), "embedded"), "general": (str(TINY / "general.txt"), "embedded")}
    configs = {}
    for mode in chosen:
        measured = {name: (value, f"{mode}'s default") for name, value in modes.MODES[mode].TRAINING.items()}
        train, origins = resolve(TrainOptions, args, embedded | measured)
        pairs, data_origins = resolve(DataOptions, args, embedded)
        own, own_origins = resolve(modes.MODES[mode].Options, args, {})
        check(train)
        configs[mode] = run.Config(mode, train, pairs, own, origins | data_origins | own_origins)
    return configs


def check(options: TrainOptions) -> None:
    """Refuse numbers that make no sense before anything is loaded."""
    at_least = {"batch": 1, "accumulate": 1, "steps": 1, "eval_every": 1, "val_rows": 1, "test_rows": 1,
                "max_new_tokens": 1, "patience": 0, "clip": 0, "weight_decay": 0, "seed": 0}
    for name, least in at_least.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{flag(name)} {value}: must be at least {least}")
    if options.lr <= 0 or options.epochs <= 0:
        raise UserError(f"--lr {options.lr} --epochs {options.epochs}: both must be above 0")
    if not 0 <= options.warmup_ratio <= 1 or not 0 <= options.model_dropout < 1:
        raise UserError(f"--warmup-ratio {options.warmup_ratio} --model-dropout {options.model_dropout}: "
                        "the first lies "
                        "in 0..1, the second is at least 0 and below 1")


def main(arguments: list[str]) -> None:
    configs = parse(arguments)
    first = next(iter(configs.values()))
    options = first.train
    device = choose_device(options.device)
    several = len(configs) > 1
    out = Path(options.out) if options.out else run.next_free(Path("runs") / (options.mode.replace(",", "-")))
    base = weights.load(options.model)
    base.set_compute_dtype(choose_dtype(options.dtype, device))
    base.to(device)
    print(f"base {base.folder}: {sum(p.numel() for p in base.parameters()):,} parameters, on {device} in "
          f"{str(base.compute_dtype).removeprefix('torch.')}")
    room = base.config.n_positions - max(config.prompt_tokens for config in configs.values())
    limits = {"train": None, "val": options.val_rows, "test": options.test_rows}
    rows, lines = data.load_examples(first.data, options.seed, base, room, limits)
    print("\n".join(f"  {line}" for line in lines))
    for name in limits:
        if not rows[name]:
            raise UserError(f"{first.data.data}: there are no {name} rows: give every split a share in "
                            "--split")
    general = data.read_text(options.general) if options.general else None
    folders = {mode: out / mode if several else out for mode in configs}
    if not options.resume:
        run.create(out, options.overwrite)
        for mode, config in configs.items():
            folders[mode].mkdir(exist_ok=True)
            run.save_config(folders[mode], config)
            print(run.describe(config))
    before = metrics.score(base, rows["test"], options.batch, options.max_new_tokens, general)
    del base
    results = [tune(config, rows, general, before, folders[mode]) for mode, config in configs.items()]
    if several:
        run.write_json(out / "compare.json", results)
        print("\n" + compare.table(results))
    else:
        print(f"next: python eval.py {out} --prompt TEXT, or the same on your own pairs: "
              f"python train.py --mode {first.mode} --model gpt2 --data YOUR.jsonl")


if __name__ == "__main__":
    run_script(main)
