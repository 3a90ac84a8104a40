"""Score a run beside its base, generate with it, or save it as a plain GPT-2.

    python eval.py runs/lora-1                        base and tuned on the test rows, side by side
    python eval.py runs/lora-1 --general FILE.txt     and what the model forgot of other text
    python eval.py runs/lora-1 --prompt "Anna: Hi"    continue a prompt (- reads it from standard input)
    python eval.py runs/lora-1 --save DIR             the tuned model as a Hugging Face folder
    python eval.py runs/lora-1 --save-peft DIR        what was tuned as a PEFT folder: LoRA and soft prompts
    python eval.py --adapter A --adapter B            several runs or PEFT folders on one base, a row each
    python eval.py --compare runs/*                   finished runs in one table and one picture
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift import distributed as parallel
from minift import modes
from minift.data import dataset as data
from minift.device import DEVICES, DTYPES, choose_device, choose_dtype
from minift.errors import UserError, run_script
from minift.files import checkpoint, peft, weights
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.modes import lora
from minift.options import Parser, add_options, flag, option, resolve
from minift.report import compare, metrics
from minift.run import config
from minift.run.config import Config


@dataclass(frozen=True)
class EvalOptions:
    model: str | None = option(None, "the base, if it is not where the run found it (it must be the same "
                                     "one), or if there are PEFT folders alone")
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
    save_peft: str | None = option(None, "write what was tuned as a PEFT folder: LoRA and soft prompts")
    json: bool = option(False, "print one JSON object with base and tuned (or each folder), and nothing else")
    dtype: str = option("auto", "what to compute in; auto: bf16 where the hardware has it", DTYPES)
    device: str = option("auto", "where to compute", DEVICES)


def load_tuned(folder: Path, asked: Config | None, base: GPT, base_name: str) -> tuple[GPT, str]:
    """A second model on the base's weights with what the folder tuned, and its mode. A run's config.json,
    `asked`, must agree with its file."""
    model = base.share()
    belongs = checkpoint.identity(base, asked.mode, asked.own, base_name) if asked else None
    return model, checkpoint.load_tuned(folder, model, base_name, belongs)


def check(options: EvalOptions, args: Any, folders: list[Path]) -> None:
    """Refuse numbers and combinations of options that make no sense before anything is loaded."""
    at_least = {"test_rows": 1, "shown": 0, "batch": 1, "max_new_tokens": 1, "seed": 0, "temperature": 0,
                "top_k": 1}
    for name, least in at_least.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{flag(name)} {value}: must be at least {least}")
    for name in ("temperature", "top_k", "top_p", "seed"):
        if getattr(args, name) is not None and options.prompt is None:
            raise UserError(f"{flag(name)} is for generating: it needs --prompt TEXT")
    saves = options.save or options.save_peft
    if options.json and (options.prompt is not None or saves or options.describe):
        raise UserError("--json prints scores: leave out --prompt, --save, --save-peft and --describe, or "
                        "--json")
    if saves and len(folders) > 1:
        raise UserError("--save and --save-peft write one model: give them one folder")


def complete(model: GPT, options: EvalOptions, rows: int) -> list[str]:
    """Continuations of --prompt, which fills a batch of `rows` rows."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8 text: {error}") from None
    ids = data.tokenize(model.tokenizer, [text])[0]
    sampling = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    new = generate(model, [ids] * rows, options.max_new_tokens, **sampling, seed=options.seed,
                   stop=model.config.eos_token_id)
    return [model.tokenizer.decode(tokens) for tokens in new]


def show(scores: dict[str, dict[str, Any]], examples: list[data.Example], shown: int) -> None:
    """Base and tuned in two columns, or several in a row each; then some completions."""
    numbers = [name for name, value in scores["base"].items() if isinstance(value, float)]
    if scores["base"]["general_loss"] is not None:
        for score in scores.values():
            score["forgetting"] = score["general_loss"] - scores["base"]["general_loss"]
    if "tuned" in scores:
        print(f"{'':16}{'base':>12}{'tuned':>12}")
        for name in numbers:
            print(f"{name:16}{scores['base'][name]:12.4f}{scores['tuned'][name]:12.4f}")
        if "forgetting" in scores["tuned"]:
            print(f"forgetting: {scores['tuned']['forgetting']:+.4f} nats a token on the general text")
    else:
        headings = {"name": "", **{name: name for name in (*numbers, "forgetting") if name in scores["base"]}}
        print(compare.table([{"name": name, **score} for name, score in scores.items()], headings))
    width = max(map(len, ("wanted", *scores)))
    for i, example in enumerate(examples[:shown]):
        print(f"\n{example.pair.where}\n  {'wanted':{width}} {example.pair.completion!r}")
        for name, score in scores.items():
            print(f"  {name:{width}} {score['completions'][i]!r}")


@parallel.processes()
def main(arguments: list[str]) -> None:
    if parallel.WORLD > 1:
        raise UserError("eval.py is one process: python eval.py ..., without torchrun")
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("run", nargs="?", help="the folder of a run, or a PEFT folder")
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR",
                        help="the same; may be given several times: all of them on one base")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print a table of finished runs; write "
                        "compare.md and, with matplotlib, compare.png beside them")
    add_options(parser, "options", EvalOptions)
    args = parser.parse_args(arguments)
    if args.compare:
        print(compare.compare_runs([Path(run) for run in args.compare]))
        return
    options, _ = resolve(EvalOptions, args, {})
    folders = list(dict.fromkeys(Path(name) for name in (args.run, *args.adapter) if name is not None))
    if not folders:
        parser.error("which run? give its folder, or --adapter DIR once or more")
    check(options, args, folders)
    asked = {folder: None if peft.is_folder(folder) else config.load(folder) for folder in folders}
    first = next(filter(None, asked.values()), None)  # says what to score on, and the base
    if first is None and options.model is None:
        raise UserError(f"{folders[0]} is a PEFT folder, which does not hold its base: give --model")
    base_name = options.model or first.train.model
    loaded, device = weights.load(base_name), choose_device(options.device)
    base = config.as_model(loaded)
    base.requires_grad_(False)
    if options.save or options.save_peft:
        save(*load_tuned(folders[0], asked[folders[0]], base, base_name), folders[0], options, loaded)
        return
    base.set_compute_dtype(choose_dtype(options.dtype, device))
    data.require_tokenizer(base)
    base.to(device)
    tuned = {folder: load_tuned(folder, asked[folder], base, base_name) for folder in folders}
    if options.prompt is None and not options.describe:
        score_all(base, tuned, first, options)
        return
    models = [model for model, _ in tuned.values()]
    if options.prompt is not None and len(models) == 1:
        print(complete(models[0], options, 1)[0])
    elif options.prompt is not None:
        mixed = lora.mix(base, models)
        lora.choose(mixed, range(-1, len(models)))
        for name, text in zip(("base", *folders), complete(mixed, options, 1 + len(models)), strict=True):
            print(f"{name}: {text}")
    if options.describe:
        for model, mode in tuned.values():
            print("\n".join(modes.describe(model, mode)))


def save(model: GPT, mode: str, folder: Path, options: EvalOptions, base: weights.Base) -> None:
    """--save and --save-peft."""
    if options.save_peft:
        peft.save(Path(options.save_peft), model, mode, base.name)
        print(f"{options.save_peft}: {mode} of {folder} as a PEFT folder")
    if options.save:
        modes.merge(model, mode)
        weights.save_folder(base, model, Path(options.save))
        print(f"{options.save}: {mode} of {folder} as a Hugging Face folder")


def score_all(base: GPT, tuned: dict[Path, tuple[GPT, str]], first: Config | None,
              options: EvalOptions) -> None:
    """The default job: the same test rows with the base and with each tuned model on it."""
    if first is None and options.data is None:
        raise UserError("a PEFT folder does not say what to score it on: give --data")
    pairs_from = first.data if options.data is None else data.DataOptions(options.data)
    room = base.config.n_positions - max(model.prompt_tokens for model, _ in tuned.values())
    seed = first.train.seed if first else config.TrainOptions.seed
    examples, lines = data.load_examples(pairs_from, seed, base, room, {"test": options.test_rows})
    if not examples["test"]:
        raise UserError(f"{pairs_from.data}: there are no test rows to score")
    general_file = options.general or (first.train.general if first else None)
    general = data.read_text(general_file) if general_file else None
    names = map(str, tuned) if len(tuned) > 1 else ["tuned"]
    models = {"base": base} | {name: model for name, (model, _) in zip(names, tuned.values(), strict=True)}
    scores = {name: metrics.score(model, examples["test"], options.batch, options.max_new_tokens, general)
              for name, model in models.items()}
    if options.json:
        print(json.dumps(scores))
        return
    print("\n".join(f"  {line}" for line in lines))
    if general and any(model.prompt_tokens for model, _ in tuned.values()):
        print("  the general text is read with the soft prompt attached")
    made = ", ".join(f"{mode} of {folder}" for folder, (_, mode) in tuned.items())
    print(f"{made}, {len(examples['test'])} test rows")
    show(scores, examples["test"], options.shown)


if __name__ == "__main__":
    run_script(main)
