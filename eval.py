"""Score a run beside its base, generate with it, or save it as a plain GPT-2.

    python eval.py runs/lora-1                        base and tuned on the test rows, side by side
    python eval.py runs/lora-1 --general FILE.txt     and what the model forgot of other text
    python eval.py runs/lora-1 --prompt "Anna: Hi"    continue a prompt (- reads it from standard input)
    python eval.py runs/lora-1 --save DIR             the tuned model as a Hugging Face folder
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift import checkpoint, config, data, metrics, modes, parallel, weights
from minift.config import Config
from minift.errors import UserError, run_script
from minift.generate import generate
from minift.machine import DEVICES, DTYPES, choose_device, choose_dtype
from minift.model import GPT
from minift.options import Parser, add_options, flag, option, resolve


@dataclass(frozen=True)
class EvalOptions:
    model: str | None = option(None, "the base, if it is not where the run found it; it must be the same one")
    data: str | None = option(None, "score on the test rows of these pairs (default: the run's)")
    test_rows: int | None = option(None, "score the first N test rows (default: all)")
    general: str | None = option(None, "a text file outside the task: its loss before and after is the "
                                       "forgetting (default: the run's)")
    shown: int = option(3, "how many completions to show")
    batch: int = option(16, "rows in a forward pass")
    max_new_tokens: int = option(64, "length limit of generated texts")
    prompt: str | None = option(None, "continue this text, as it stands; - reads it from standard input")
    temperature: float = option(0.0, "of --prompt: 0 is greedy, 1 the model's own distribution")
    top_k: int | None = option(None, "of --prompt: sample among the k likeliest tokens")
    top_p: float | None = option(None, "of --prompt: sample among the likeliest tokens that hold this "
                                       "probability")
    seed: int = option(0, "of --prompt: seed of sampling")
    describe: bool = option(False, "print what was learned, such as the tokens nearest to a soft prompt")
    save: str | None = option(None, "write the tuned model as a Hugging Face folder, merged if need be")
    json: bool = option(False, "print one JSON object with base and tuned, and nothing else")
    dtype: str = option("auto", "what to compute in; auto: bf16 where the hardware has it", DTYPES)
    device: str = option("auto", "where to compute", DEVICES)


def load_base(asked: Config, options: EvalOptions) -> GPT:
    """The run's base, untouched, in the compute dtype and on the device of `options`."""
    device = choose_device(options.device)
    model = weights.load(options.model or asked.train.model)
    model.requires_grad_(False)
    model.set_compute_dtype(choose_dtype(options.dtype, device))
    data.require_tokenizer(model)
    return model.to(device)


def load_tuned(folder: Path, asked: Config, model: GPT, base_name: str) -> str:
    """What the run tuned into its untouched base, if config.json and the file agree; gives the mode."""
    belongs = checkpoint.identity(model, asked.mode, asked.own, base_name)
    return checkpoint.load_tuned(folder, model, base_name, belongs)


def check(options: EvalOptions, args: Any) -> None:
    """Refuse numbers and combinations of options that make no sense before anything is loaded."""
    at_least = {"test_rows": 1, "shown": 0, "batch": 1, "max_new_tokens": 1, "seed": 0, "temperature": 0,
                "top_k": 1}
    for name, least in at_least.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{flag(name)} {value}: must be at least {least}")
    for name in ("temperature", "top_k", "top_p", "seed"):
        if getattr(args, name) is not None and options.prompt is None:
            raise UserError(f"{flag(name)} is for generating: it needs --prompt TEXT")
    if options.json and (options.prompt is not None or options.save or options.describe):
        raise UserError("--json prints scores: leave out --prompt, --save and --describe, or --json")


def complete(model: GPT, options: EvalOptions) -> str:
    """The continuation of --prompt."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8 text: {error}") from None
    ids = data.tokenize(model.tokenizer, [text])[0]
    new = generate(model, [ids], options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
                   top_p=options.top_p, seed=options.seed, stop=model.config.eos_token_id)[0]
    return model.tokenizer.decode(new)


def show(scores: dict[str, dict[str, Any]], examples: list[data.Example], shown: int) -> None:
    """Base and tuned in two columns, then some completions."""
    print(f"{'':16}{'base':>12}{'tuned':>12}")
    for name, before in scores["base"].items():
        if isinstance(before, float):
            print(f"{name:16}{before:12.4f}{scores['tuned'][name]:12.4f}")
    if scores["base"]["general_loss"] is not None:
        change = scores["tuned"]["general_loss"] - scores["base"]["general_loss"]
        print(f"forgetting: {change:+.4f} nats a token on the general text")
    completions = zip(examples, scores["base"]["completions"], scores["tuned"]["completions"], strict=True)
    for example, before, after in list(completions)[:shown]:
        print(f"\n{example.pair.where}\n  wanted {example.pair.completion!r}\n  base   {before!r}\n"
              f"  tuned  {after!r}")


@parallel.processes()
def main(arguments: list[str]) -> None:
    if parallel.WORLD > 1:
        raise UserError("eval.py is one process: python eval.py ..., without torchrun")
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("run", help="the folder of a run")
    add_options(parser, "options", EvalOptions)
    args = parser.parse_args(arguments)
    options, _ = resolve(EvalOptions, args, {})
    check(options, args)
    folder = Path(args.run)
    asked = config.load(folder)
    base_name = options.model or asked.train.model
    if options.save:
        model = weights.load(base_name)
        mode = load_tuned(folder, asked, model, base_name)
        modes.merge(model, mode)
        weights.save_folder(model, Path(options.save))
        print(f"{options.save}: {mode} of {folder} as a Hugging Face folder")
        return
    model = load_base(asked, options)
    if options.prompt is not None or options.describe:
        mode = load_tuned(folder, asked, model, base_name)
        if options.prompt is not None:
            print(complete(model, options))
        if options.describe:
            print("\n".join(modes.describe(model, mode)))
        return
    score_both(folder, asked, options, model, base_name)


def score_both(folder: Path, asked: Config, options: EvalOptions, model: GPT, base_name: str) -> None:
    """The default job: the same test rows before and after the tuned tensors are loaded."""
    pairs_from = asked.data if options.data is None else data.DataOptions(options.data)
    room = model.config.n_positions - asked.prompt_tokens
    limits = {"test": options.test_rows}
    examples, lines = data.load_examples(pairs_from, asked.train.seed, model, room, limits)
    if not examples["test"]:
        raise UserError(f"{pairs_from.data}: there are no test rows to score")
    general_file = options.general or asked.train.general
    general = data.read_text(general_file) if general_file else None
    scores = {"base": metrics.score(model, examples["test"], options.batch, options.max_new_tokens, general)}
    mode = load_tuned(folder, asked, model, base_name)
    scores["tuned"] = metrics.score(model, examples["test"], options.batch, options.max_new_tokens, general)
    if options.json:
        print(json.dumps(scores))
        return
    print("\n".join(f"  {line}" for line in lines))
    if general and model.prompt_tokens:
        print("  the general text is read with the soft prompt attached")
    print(f"{mode} of {folder}, {len(examples['test'])} test rows")
    show(scores, examples["test"], options.shown)


if __name__ == "__main__":
    run_script(main)
