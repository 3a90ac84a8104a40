"""What a run is asked to do: the options of train.py, from the command line or from a run's config.json."""

import argparse
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minift import distributed as parallel
from minift import modes
from minift.data.dataset import DataOptions, require_tokenizer
from minift.device import DEVICES, DTYPES
from minift.errors import UserError
from minift.files import checkpoint, weights
from minift.model.gpt import GPT
from minift.ops.lora import KERNELS
from minift.options import Parser, add_options, flag, from_json, option, resolve
from minift.run import folder as run

TINY = Path(__file__).parents[2] / "data" / "tiny"  # the embedded base, its pairs and its general text


@dataclass(frozen=True)
class TrainOptions:
    mode: str = option("lora", f"how to tune: {', '.join(modes.MODES)}, a comma list of them, or all")
    model: str | None = option(None, "a folder's path, or gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                                     "distilgpt2 from the Hub (default: the embedded base)")
    adapter: str | None = option(None, "start from what this folder tuned, a run's or one of PEFT (LoRA, "
                                       "prompt tuning), in its mode and with its options")
    out: str | None = option(None, "folder of the run (default: runs/MODE-1, runs/MODE-2, ...)")
    overwrite: bool = option(False, "replace the run that is in --out")
    plan: bool = option(False, "print what each mode would cost and run nothing: needs no weights and no "
                               "network, and --model may also be gpt3-175b")
    epochs: float = option(3.0, "passes over the training rows")
    steps: int | None = option(None, "optimizer steps, instead of --epochs")
    batch: int = option(16, "rows in a forward pass, those of all processes together")
    accumulate: int = option(1, "forward passes in an optimizer step; the loss is a mean over all their "
                                "target tokens")
    lr: float | None = option(None, "peak learning rate (default: the mode's)")
    weight_decay: float | None = option(None, "decay of matrices; biases, norms and soft prompts have none "
                                              "(default: the mode's)")
    order: str = option("length", "length: random batches of rows of like length; file: as they stand",
                        ("length", "file"))
    checkpoint: bool = option(False, "keep only each block's input for the backward pass, and compute the "
                                     "rest again there: a third more time, far less memory")
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
    shard: bool = option(False, "spread the model over torchrun's processes (FSDP2), if it is too large for "
                                "one device")
    kernel: str = option("auto", "how mode lora computes its update; auto: Triton on a GPU where it was "
                                 "measured to win, else PyTorch", KERNELS)
    seed: int = option(0, "seed of everything random: split, order, initialisation, dropout")
    on_nan: str = option("stop", "what to do about a loss or gradient that is not finite", ("stop", "skip"))
    max_skips: int = option(10, "with --on-nan skip: steps left out before the run ends after all")
    resume: str | None = option(None, "go on with the run in this folder, with the options it was started "
                                      "with")


@dataclass(frozen=True)
class Config:
    """A run's resolved options, and for each where its value came from: {name: (value, origin)}."""

    mode: str
    train: TrainOptions
    data: DataOptions
    own: Any  # the mode's Options
    origins: dict[str, tuple[Any, str]]

    @property
    def prompt_tokens(self) -> int:
        """Positions that the mode's soft prompt will take; 0 for a mode without one."""
        return getattr(self.own, "prompt_tokens", 0)


def parse(arguments: list[str], description: str) -> dict[str, Config]:
    """The command line as one resolved configuration for each mode to run."""
    parser = Parser(prog="train.py", description=description)
    add_options(parser, "training", TrainOptions)
    add_options(parser, "data", DataOptions)
    for name, module in modes.MODES.items():
        add_options(parser, f"mode {name}", module.Options)
    args = parser.parse_args(arguments)
    if args.resume:
        given = {name for name, value in vars(args).items() if value is not None}
        others = sorted(given - {"resume", "debug"})
        if others:
            raise UserError("--resume goes on with the options that the run was started with: leave out "
                            f"{flag(others[0])}")
        return {one.mode: replace(one, train=replace(one.train, resume=args.resume, out=args.resume))
                for one in parallel.from_first(lambda: load_all(Path(args.resume)))}

    start = read_start(args) if args.adapter is not None else None
    asked = start[0] if start else args.mode or ("all" if args.plan else TrainOptions.mode)
    chosen = list(modes.MODES) if asked == "all" else asked.split(",")
    for mode in chosen:
        if mode not in modes.MODES or chosen.count(mode) > 1:
            raise UserError(f"--mode {args.mode}: {mode!r} is not a mode, or stands there twice; there are "
                            f"{', '.join(modes.MODES)}, and all")
    for mode in modes.MODES.keys() - chosen:
        for field in fields(modes.MODES[mode].Options):
            if getattr(args, field.name) is not None:
                raise UserError(f"{flag(field.name)} belongs to mode {mode}, and this run is "
                                f"{', '.join(chosen)}: leave it out or change --mode")
    if args.shard and (args.plan or parallel.WORLD == 1):
        raise UserError("--shard spreads a run over several processes: torchrun --nproc-per-node N train.py "
                        "...; --plan knows a process that holds the whole model")
    if args.kernel and not any(hasattr(modes.MODES[mode], "lora_linear") for mode in chosen):
        raise UserError("--kernel is about the low-rank update, and this run is "
                        f"{', '.join(chosen)}: leave it out or change --mode")
    if args.model and not args.data and not args.plan:
        raise UserError("--model needs --data FILE_OR_FOLDER: the embedded pairs belong to the embedded base")
    embedded = {"data": (str(TINY / "pairs"), "embedded")}
    if not args.model:
        embedded |= {"model": (str(TINY), "embedded"), "general": (str(TINY / "general.txt"), "embedded")}
    if start:
        embedded["mode"] = (start[0], "adapter")
    if not args.data and not args.steps:
        embedded |= {"epochs": (0.8, "embedded"), "val_rows": (100, "embedded")}  # enough, as measured
    rates = {} if args.model else json.loads((TINY / "learning_rates.json").read_text(encoding="utf-8"))
    configs = {}
    for mode in chosen:
        measured = {name: (value, f"{mode}'s default") for name, value in modes.MODES[mode].TRAINING.items()}
        if mode in rates:
            measured["lr"] = (rates[mode], "embedded")
        train, origins = resolve(TrainOptions, args, embedded | measured)
        pairs, data_origins = resolve(DataOptions, args, embedded)
        given = {name: (value, "adapter") for name, value in asdict(start[1]).items()} if start else {}
        own, own_origins = resolve(modes.MODES[mode].Options, args, given)
        check(train)
        configs[mode] = Config(mode, train, pairs, own, origins | data_origins | own_origins)
    return configs


def as_model(base: weights.Base) -> GPT:
    """Until the callers use Base itself: its model with the attributes that they read."""
    base.model.tokenizer, base.model.folder = base.tokenizer, base.folder
    base.model.fingerprint = base.fingerprint
    return base.model


def read_start(args: argparse.Namespace) -> tuple[str, Any]:
    """The mode and options of --adapter, whose folder says them all. Raises UserError."""
    base = args.model or str(TINY)
    mode, own, _ = checkpoint.read_tuned(Path(args.adapter), as_model(weights.load_on_meta(base)), base)
    for name in asdict(own):
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)}: --adapter {args.adapter} has {getattr(own, name)}: leave "
                            f"{flag(name)} out")
    if args.mode not in (None, mode):
        raise UserError(f"--mode {args.mode}: --adapter {args.adapter} is of mode {mode}: leave --mode out")
    return mode, own


def check(options: TrainOptions) -> None:
    """Refuse numbers that make no sense before anything is loaded."""
    at_least = {"batch": 1, "accumulate": 1, "steps": 1, "eval_every": 1, "val_rows": 1, "test_rows": 1,
                "max_new_tokens": 1, "patience": 0, "max_skips": 0, "clip": 0, "weight_decay": 0, "seed": 0}
    for name, least in at_least.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{flag(name)} {value}: must be at least {least}")
    if options.lr <= 0 or not 0 < options.epochs <= 1e6:
        raise UserError(f"--lr {options.lr} --epochs {options.epochs}: both must be above 0, and --epochs at "
                        "most 1,000,000")
    if not 0 <= options.warmup_ratio <= 1 or not 0 <= options.model_dropout < 1:
        raise UserError(f"--warmup-ratio {options.warmup_ratio} --model-dropout {options.model_dropout}: "
                        "the first lies in 0..1, the second is at least 0 and below 1")


def check_modes(asked: dict[str, Config], base: GPT) -> None:
    """Refuse what a mode cannot do with this base before anything is scored or written."""
    require_tokenizer(base)
    for mode, one in asked.items():
        trial = as_model(weights.load_on_meta(str(base.folder)))
        try:
            modes.apply(trial, mode, one.own)
        except RuntimeError as error:  # even without memory, a tensor can be too large
            raise UserError(f"--mode {mode} cannot be applied to {base.folder} with these options: "
                            f"{error}") from None
        if one.train.adapter and not one.train.resume:
            trial.fingerprint = base.fingerprint
            _, _, tensors = checkpoint.read_tuned(Path(one.train.adapter), trial, one.train.model)
            modes.check_tuned(trial, tensors, one.train.adapter)
        if not modes.tuned_parameters(trial):
            raise UserError(f"--mode {mode} leaves nothing to train in {base.folder} with these options")
        room = trial.config.n_positions - trial.prompt_tokens
        if one.train.max_new_tokens >= room:
            raise UserError(f"--max-new-tokens {one.train.max_new_tokens} leaves no room for a prompt in the "
                            f"{room} positions of the model: lower it")


def describe(config: Config) -> str:
    """The configuration as lines of `name = value (origin)`, defaults last and together."""
    chosen = [f"  {name} = {value}  ({origin})" for name, (value, origin) in config.origins.items()
              if origin != "default"]
    defaults = ", ".join(f"{n} {v}" for n, (v, origin) in config.origins.items()
                         if origin == "default" and v is not None)
    return "\n".join([f"mode {config.mode}", *chosen, f"  by default: {defaults}"])


def save(folder: Path, config: Config) -> None:
    if parallel.FIRST:
        folder.mkdir(exist_ok=True)
    run.write_json(folder / "config.json", {
        "mode": config.mode, "train": asdict(config.train), "data": asdict(config.data),
        "own": asdict(config.own), "origins": config.origins})


def load(folder: Path) -> Config:
    """What `save` wrote. Raises UserError when the folder is not a run's, or the options are not this
    version's."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        train = from_json(TrainOptions, raw["train"], str(path))
        own = from_json(modes.MODES[raw["mode"]].Options, raw["own"], str(path))
        origins = {name: (value, origin) for name, (value, origin) in raw["origins"].items()}
        if None in (train.model, train.lr, train.weight_decay):
            raise ValueError("model, lr and weight_decay must not be null")
        check(train)
        return Config(raw["mode"], train, from_json(DataOptions, raw["data"], str(path)), own, origins)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run's folder: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}") from None


def load_all(folder: Path) -> list[Config]:
    """The run of a folder, or all runs of a comparison, whose compare.json names their modes from its
    beginning. Raises UserError."""
    path = folder / "compare.json"
    if not path.is_file():
        one = load(folder)
        if one.mode != one.train.mode and (folder.parent / path.name).is_file():
            raise UserError(f"{folder} is part of a comparison: --resume {folder.parent} goes on with all "
                            "of it")
        return [one]
    try:
        chosen = [result["mode"] for result in json.loads(path.read_text(encoding="utf-8"))]
        return [load(folder / mode) for mode in chosen if mode in modes.MODES]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}") from None


