"""Score a run beside its base, generate with it, or save it as a plain GPT-2.

    python eval.py runs/lora-1                        base and tuned on the test rows, side by side
    python eval.py runs/lora-1 --general FILE.txt     and how much the model forgot of other text
    python eval.py runs/lora-1 --prompt "Anna: Hi"    continue a prompt (- reads it from standard input)
    python eval.py runs/lora-1 --predict new.jsonl --out predictions.jsonl      an answer to every row of a file
    python eval.py runs/lora-1 --save DIR             the tuned model as a Hugging Face folder
    python eval.py runs/lora-1 --save-peft DIR        the tuned parameters as a PEFT folder: LoRA and soft prompts
    python eval.py runs/lora-1 --latency              the speed of base, tuned and merged model
    python eval.py runs/lora-1 --shots 3              the base with three training rows before each prompt, and tuned
    python eval.py runs/lora-1 --bias PAIRS.csv       how often each finds the stereotyped one of two sentences likelier
    python eval.py --adapter A --adapter B            several runs or PEFT folders on one base, one after another
    python eval.py --compare runs/*                   finished runs in one table and one picture
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minift.quick_help import eval_parser, exit_with_help

if __name__ == "__main__":
    exit_with_help(eval_parser)  # before the imports below, since torch's takes more than a second

from minift import modes, ops
from minift.data import dataset
from minift.data.dataset import DataOptions
from minift.data.row_store import Examples
from minift.device import DEVICES, DTYPES, choose_device, choose_dtype, configure_process
from minift.distributed import WORLD_SIZE, processes
from minift.errors import UserError, run_script
from minift.files import checkpoint, peft, weights
from minift.files.atomic import read_json, write_json
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.options import Parser, add_options, flag, option, resolve
from minift.report import bias, compare, evaluation, latency, metrics, shots
from minift.report.predict import Decoding, PredictOptions, Predictor, predict
from minift.report.prompt import find_run_layout, print_continuations
from minift.run import config as configuration
from minift.run.config import Config, TrainOptions


@dataclass(frozen=True)
class EvalOptions:
    model: str | None = option(None, "the base, if it is not where the run found it (it must be the same one), or if "
                                     "there are only PEFT folders")
    test_rows: int | None = option(None, "score the first N test rows (default: all)", least=1)
    general: str | None = option(None, "a text file outside the task: its loss before and after is the forgetting "
                                       "(default: the run's)")
    shown: int = option(3, "how many completions to show, and how many with the most unsupported content", least=0)
    batch: int = option(16, "rows in a forward pass", least=1)
    eos: str | None = option(None, "the token that ends every row, its text or its number (default: the run's)")
    prompt: str | None = option(None, "continue this text, in the run's template if that has one field; - reads it "
                                      "from standard input")
    raw: bool = option(False, "with --prompt: continue the text as it is, without the run's template")
    latency: bool = option(False, "time base, tuned and merged model in turn, at batch 1 and 16")
    shots: int | None = option(None, "score the base with so many training rows before each prompt, beside the tuned "
                                     "model without them", least=1)
    bias: str | None = option(None, "pairs of sentences that differ in a group: CrowS-Pairs' CSV, or two columns, the "
                                    "stereotyped one first, with a third for the category")
    describe: bool = option(False, "print what the parameters learned, such as the tokens nearest to a soft prompt")
    save: str | None = option(None, "write the tuned model as a Hugging Face folder, merged where needed")
    save_peft: str | None = option(None, "write the tuned parameters as a PEFT folder: LoRA and soft prompts")
    json: bool = option(False, "print one JSON object with the scores of base and tuned, and nothing else")
    dtype: str = option("auto", "the dtype of activations; auto: bf16 where the hardware has it", choices=DTYPES)
    device: str = option("auto", "where to compute", choices=DEVICES)
    ops: str = option("fast", "plain: compute every operation by its plain reference", choices=("fast", "plain"))


# flags that have a meaning only with one of others
NEEDED = {
    "out": ("predict",), "prediction_field": ("predict",), "raw": ("prompt",), "temperature": ("prompt", "predict"),
    "top_k": ("prompt", "predict"), "top_p": ("prompt", "predict"), "seed": ("prompt", "predict"),
}  # fmt: skip
CLAIMS = ("latency", "shots", "bias")  # each writes its figures into the run's result.json
WITHOUT_PREDICT = (*CLAIMS, "prompt", "describe", "save", "save_peft", "json", "data", "split", "split_seed",
                   "test_rows", "general", "shown", "skip_bad")


@processes()
def main(arguments: list[str]) -> None:
    if WORLD_SIZE > 1:
        raise UserError("eval.py is one process: python eval.py ..., without torchrun")
    # options: three groups of flags say what to do; the flags of the data default to the run's
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.compare:
        print(compare.compare_runs([Path(run) for run in args.compare], as_json=bool(args.json)))
        return
    options, _ = resolve(EvalOptions, args, {})
    predicting, _ = resolve(PredictOptions, args, {})
    folders = list(dict.fromkeys(Path(name) for name in (args.run, *args.adapter) if name is not None))
    if not folders:
        parser.error("which run? give its folder, or --adapter DIR once or more")
    check_flags(options, predicting, args, folders)
    ops.plain = options.ops == "plain"
    configure_process()

    # a PEFT folder has no configuration: the first run's says which base and rows
    configs = {folder: None if peft.is_folder(folder) else configuration.load(folder) for folder in folders}
    first = next((config for config in configs.values() if config is not None), None)
    data, decoding = resolve_data(args, first), resolve_decoding(args, first)

    # the base, and the tuned models on its weights
    base = load_base(options, first, folders)
    if options.save or options.save_peft:
        save(base, folders[0], configs[folders[0]], options)
        return
    base.model.set_compute_dtype(choose_dtype(options.dtype, choose_device(options.device)))
    base.model.to(choose_device(options.device))
    if base.tokenizer is None:
        raise UserError(f"{base.folder} has no tokenizer: put tokenizer.json, or vocab.json and merges.txt, there")
    tuned = {folder: load_tuned(base, folder, configs[folder]) for folder in folders}

    # texts, descriptions or, without a flag, scores
    if predicting.predict is not None:
        model, _ = tuned[folders[0]]
        run_layout, _ = find_run_layout(data)
        predict(Predictor(model, base, data, decoding, options.batch), predicting, run_layout)
        return
    if options.latency or options.shots or options.bias:
        model, mode = tuned[folders[0]]
        measure_claims(base, model, mode, folders[0], first, options, data, decoding)
        return
    if options.prompt is not None:
        models = {str(folder): model for folder, (model, _) in tuned.items()}
        print_continuations(base, models, options.prompt, options.raw, data, decoding)
    if options.describe:
        for model, mode in tuned.values():
            print("\n".join(modes.describe(model, mode, base.tokenizer)))
    if options.prompt is None and not options.describe:
        score_all(base, tuned, first, options, data, decoding)


def make_parser() -> Parser:
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("run", nargs="?", help="the folder of a run, or a PEFT folder")
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR",
                        help="the same; several times: all of them on one base")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print a table of finished runs; write compare.md "
                        "and, with matplotlib, compare.png beside them")
    add_options(parser, "options", EvalOptions)
    add_options(parser, "predictions for new rows", PredictOptions)
    add_options(parser, "generated texts; all but the first with --prompt or --predict", Decoding)
    add_options(parser, "data, by default as the run has it", DataOptions)
    return parser


def check_flags(options: EvalOptions, predicting: PredictOptions, args: Any, folders: list[Path]) -> None:
    """Refuse combinations of options that make no sense, before anything is loaded."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for name, owners in NEEDED.items():
        if name in given and not given & set(owners):
            raise UserError(f"{flag(name)} needs {' or '.join(flag(owner) for owner in owners)}")
    for name in WITHOUT_PREDICT:
        if name in given and predicting.predict is not None:
            raise UserError(f"{flag(name)} does not go with --predict, which answers every row of its file: leave one "
                            "of them out")
    if "rows" in given:
        raise UserError("--rows limits the rows of training: --test-rows limits those that are scored")
    saves = options.save or options.save_peft
    for name in ("json", *CLAIMS):
        if name in given and (options.prompt is not None or saves or options.describe):
            raise UserError(f"{flag(name)} prints scores: leave out --prompt, --save, --save-peft and --describe, or "
                            f"{flag(name)}")
    if (saves or predicting.predict is not None or given & set(CLAIMS)) and len(folders) > 1:
        raise UserError("--save, --save-peft, --predict, --latency, --shots and --bias use one model: give them one "
                        "folder")


def resolve_data(args: Any, first: Config | None) -> DataOptions:
    """How to read rows: as the command line says, else as the run did."""
    of_run = {} if first is None else {name: (value, "run") for name, value in asdict(first.data).items()}
    if args.template is not None or args.prompt_field is not None:  # they say the same: one replaces the other
        of_run = {name: value for name, value in of_run.items() if name not in ("template", "prompt_field")}
    return resolve(DataOptions, args, of_run)[0]


def resolve_decoding(args: Any, first: Config | None) -> Decoding:
    limit = None if first is None else first.train.max_new_tokens
    return resolve(Decoding, args, {} if limit is None else {"max_new_tokens": (limit, "run")})[0]


def load_base(options: EvalOptions, first: Config | None, folders: list[Path]) -> Base:
    if options.model is None and first is None:
        raise UserError(f"{folders[0]} is a PEFT folder, which does not hold its base: give --model")
    base = weights.load(options.model or first.train.model)
    return weights.with_eos(base, options.eos or (first and first.train.eos))


def load_tuned(base: Base, folder: Path, config: Config | None) -> tuple[GPT, str]:
    """A second model on the base's weights with a folder's tuned parameters, and its mode. A run's config.json must
    agree with its tuned file."""
    tuned = checkpoint.read_tuned(folder, base.model.config)
    if config is not None:
        expected = checkpoint.base_metadata(base.fingerprint, config.mode, config.mode_options, base.name)
        checkpoint.check_tuned_belongs(tuned, expected)
    model = base.model.shared_copy()
    checkpoint.apply_tuned(model, tuned)
    return model, tuned.mode


def save(base: Base, folder: Path, config: Config | None, options: EvalOptions) -> None:
    """--save and --save-peft."""
    model, mode = load_tuned(base, folder, config)
    if options.save_peft:
        peft.save(Path(options.save_peft), model, mode, base.name)
        print(f"{options.save_peft}: {mode} of {folder} as a PEFT folder")
    if options.save:
        try:
            modes.merge(model, mode)
        except UserError as error:
            as_peft = "--save-peft DIR saves it for PEFT, " if modes.MODES[mode].peft_type else ""
            raise UserError(f"{error}; instead {as_peft}--predict FILE and --prompt TEXT use it as it is") from None
        weights.save_folder(base, model, Path(options.save))
        print(f"{options.save}: {mode} of {folder} as a Hugging Face folder")


def load_rows(base: Base, reserved: int, first: Config | None, data: DataOptions,
              limits: dict[str, int | None]) -> tuple[dict[str, Examples], list[str]]:
    """The rows of the splits in `limits`, with room for `reserved` positions in front, and the lines of the report."""
    if data.data is None:
        raise UserError("a PEFT folder does not say which rows to score it on: give --data")
    room = base.model.config.n_positions - reserved
    seed = first.train.seed if first else TrainOptions.seed
    rows, lines, _ = dataset.load_examples(data, seed, base.tokenizer, weights.required_eos(base), room, limits)
    if not rows["test"]:
        raise UserError(f"{data.data}: there are no test rows to score")
    return rows, lines


def measure_claims(base: Base, tuned: GPT, mode: str, folder: Path, first: Config | None, options: EvalOptions,
                   data: DataOptions, decoding: Decoding) -> None:
    """--latency, --shots and --bias: print their figures, and add them to the run's result.json."""
    results, reports = {}, []
    if options.latency or options.shots:
        limits = {"train": shots.MOST_TRAIN_ROWS} if options.shots else {}
        rows, lines = load_rows(base, tuned.prompt_tokens, first, data, limits | {"test": options.test_rows})
        reports.append("\n".join(f"  {line}" for line in lines))
    if options.bias:  # first, since a bad file ends the command
        results["bias"] = bias.measure(base, tuned, Path(options.bias), options.batch)
        reports.append(bias.report(results["bias"]))
    if options.latency:
        results["latency"] = latency.measure(base.model, tuned, mode, rows["test"], decoding.max_new_tokens)
        reports.append(latency.report(results["latency"]))
    if options.shots:
        results["shots"] = shots.measure(base, tuned, rows, options.shots, options.batch, decoding.max_new_tokens)
        reports.append(shots.report(results["shots"]))
    path = folder / "result.json"
    if path.is_file():
        write_json(path, read_json(path, dict) | results)
    else:
        print(f"{folder} has no result.json, so these figures are not saved", file=sys.stderr)
    print(json.dumps(results) if options.json else "\n\n".join(reports))


def score_all(base: Base, tuned: dict[Path, tuple[GPT, str]], first: Config | None, options: EvalOptions,
              data: DataOptions, decoding: Decoding) -> None:
    """The default job: score base and tuned models on the same test rows."""
    reserved = max(model.prompt_tokens for model, _ in tuned.values())
    rows, lines = load_rows(base, reserved, first, data, {"test": options.test_rows})
    examples = rows["test"]
    general_file = options.general or (first.train.general if first else None)
    general_rows = None
    if general_file:
        n_positions = base.model.config.n_positions
        general_rows = metrics.load_general_rows(general_file, base.tokenizer, n_positions, reserved)
    models = {"base": base.model}
    for folder, (model, _) in tuned.items():
        models[str(folder) if len(tuned) > 1 else "tuned"] = model
    scores = {}
    for name, model in models.items():
        scores[name] = metrics.score(model, base.tokenizer, base.eos_token_id, examples, options.batch,
                                     decoding.max_new_tokens, general_rows)
    evaluation.add_differences(scores)
    if options.json:
        print(json.dumps(scores))
        return
    print("\n".join(f"  {line}" for line in lines))
    if general_rows and reserved:
        print("  the general text is read with the soft prompt in front")
    made = ", ".join(f"{mode} of {folder}" for folder, (_, mode) in tuned.items())
    print(f"{made}, {len(examples)} test rows")
    print(evaluation.report(scores, examples, options.shown, decoding.max_new_tokens))


if __name__ == "__main__":
    run_script(main)
