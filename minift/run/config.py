"""The configuration of a run: the options of train.py, from the command line or from a run's config.json."""

import argparse
import itertools
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minift import modes
from minift.data.dataset import DataOptions
from minift.device import DEVICES, DTYPES
from minift.distributed import WORLD_SIZE, broadcast, is_main
from minift.errors import UserError
from minift.files import weights
from minift.files.atomic import read_json, write_json
from minift.files.checkpoint import Tuned, drop_removed_options, read_tuned
from minift.ops.kernel_choice import KERNELS
from minift.options import (
    PARSERS,
    Parser,
    add_options,
    check_bounds,
    flag,
    from_json,
    option,
    parse_float,
    parse_list,
    resolve,
    value_type,
)
from minift.run.folder import COMPARE

TINY = Path(__file__).parents[2] / "data" / "tiny"  # the embedded base, its pairs and its general text


@dataclass(frozen=True)
class TrainOptions:
    mode: str = option("lora", f"how to tune: {', '.join(modes.NAMES)}, a comma list of them, or all")
    model: str | None = option(None, "a folder's path, or gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                                     "distilgpt2 from the Hub (default: the embedded base)")
    adapter: str | None = option(None, "start from the tuned parameters in this folder, a run's or one of PEFT "
                                       "(LoRA, prompt tuning), in its mode and with its options")
    out: str | None = option(None, "folder of the run (default: runs/MODE-1, runs/MODE-2, ...)")
    overwrite: bool = option(False, "replace the run that is in --out")
    plan: bool = option(False, "print the cost of each mode and run nothing: needs no weights and no network, "
                               "and --model may also be gpt3-175b")
    epochs: float = option(3.0, "passes over the training rows", above=0, most=1_000_000)
    steps: int | None = option(None, "optimizer steps, instead of --epochs", least=1)
    batch: int = option(16, "rows in a forward pass, of all processes together", least=1)
    accumulate: int = option(1, "forward passes in an optimizer step; the loss is the mean over all their "
                                "target tokens", least=1)
    lr: float | None = option(None, "peak learning rate; auto: three around the mode's default, and more in the better "
                                    "direction until the best is not the last one (default: the mode's)", above=0)
    weight_decay: float | None = option(None, "decay of matrices; biases, norms and soft prompts have none "
                                              "(default: the mode's)", least=0)
    order: str = option("length", "length: random batches of rows of similar length; file: the order of the file",
                        choices=("length", "file"))
    checkpoint: bool = option(False, "keep only each block's input for the backward pass and recompute the rest: "
                                     "a third more time, far less memory")
    schedule: str = option("cosine", "the learning rate after warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = option(0.06, "fraction of the steps in which the learning rate rises from 0",
                                 least=0, most=1)
    clip: float = option(1.0, "largest norm of the whole gradient; 0 does not clip", least=0)
    model_dropout: float = option(0.0, "GPT-2's own dropout (embeddings, attention, residuals); config.json's is "
                                       "not used", least=0, below=1)
    eval_every: int | None = option(None, "steps between validations (default: ten validations a run)", least=1)
    patience: int = option(3, "validations without a better loss before the run stops; 0: neither a run nor a trial "
                              "stops early", least=0)
    val_rows: int = option(200, "validate on the first N validation rows", least=1)
    test_rows: int = option(200, "score the first N test rows at the end", least=1)
    max_new_tokens: int | None = option(None, "length limit of generated completions (default: the longest reference "
                                              "of the validation rows, at most half of the model's positions)",
                                        least=1)
    eos: str | None = option(None, "the token that ends every row, its text or its number (default: the base's "
                                   "end-of-text)")
    general: str | None = option(None, "a text file outside the task: its loss before and after is the "
                                       "forgetting")
    dtype: str = option("auto", "the dtype of activations; auto: bf16 where the hardware has it", choices=DTYPES)
    device: str = option("auto", "where to compute", choices=DEVICES)
    shard: bool = option(False, "spread the model over torchrun's processes (FSDP2), if it is too large for one "
                                "device")
    kernel: str = option("auto", "how low-rank updates are computed, and with Triton the norms; auto: by the "
                                 "rule that a benchmark wrote for this kind of GPU, else torch", choices=KERNELS)
    graphs: str = option("auto", "on a GPU in bf16: all kernels of a step are launched together, as a CUDA graph; "
                                 "auto: in small steps (not measured yet)", choices=("auto", "on", "off"))
    ops: str = option("fast", "plain: compute every operation by its plain reference (slow, to read or to find a "
                              "bug)", choices=("fast", "plain"))
    seed: int = option(0, "seed of everything random: split, order, initial values, dropout", least=0)
    seeds: int = option(1, "repeat the run, after a search the chosen one, with so many seeds from --seed on, on the "
                           "same rows: means and standard deviations", least=1, most=1000)
    resume: str | None = option(None, "resume the run in this folder, with the options it was started with; --epochs, "
                                      "--steps or --patience beside it continue a run beyond its end")

    @property
    def row_limits(self) -> dict[str, int | None]:
        """{split: the most rows that are used, None for all}."""
        return {"train": None, "val": self.val_rows, "test": self.test_rows}


ON_RESUME = "--resume"  # the origin of an option that was changed when the run was resumed
EXTENDING = ("epochs", "steps", "patience")  # the options that may be given beside --resume
AUTO = ("auto",)  # the value of --lr auto
SEARCHED = "searched"  # the origin of an option that has several values to try


def parse_rates(text: str) -> Any:
    """--lr: a rate, a comma list of rates, or auto. Raises ValueError."""
    return AUTO if text == "auto" else parse_list(parse_float)(text)


parse_rates.__name__ = "number, list of numbers or auto"  # in argparse's messages


@dataclass(frozen=True)
class Config:
    """A run's resolved options, and the origin of each: {name: (value, origin)}. `search` has the options with several
    values to try: {name: values}, or {"lr": AUTO}.

    `part`: the trial or the repetition, in words, if the run is one. Not saved: `adapter`, the content of --adapter;
    `extended`: --resume came with one of EXTENDING; `root`: the folder for --resume, since a comparison resumes as one,
    and so do a run, its trials and its repetitions; `stop_losses`: {step: the validation loss above which a trial
    stops there}.
    """

    mode: str
    train: TrainOptions
    data: DataOptions
    mode_options: Any  # the mode's Options
    origins: dict[str, tuple[Any, str]]
    search: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    part: str = ""
    adapter: Tuned | None = None
    extended: bool = False
    root: Path | None = None
    stop_losses: dict[int, float] = field(default_factory=dict)

    def changed(self, **values: tuple[Any, str]) -> "Config":
        """The configuration with other training options, given as name=(value, origin)."""
        train = replace(self.train, **{name: value for name, (value, _) in values.items()})
        return replace(self, train=train, origins=self.origins | values)

    def with_options(self, values: dict[str, Any], origin: str) -> "Config":
        """The configuration with other options of the training or of the mode."""
        of_mode = {name: value for name, value in values.items() if hasattr(self.mode_options, name)}
        of_train = {name: (value, origin) for name, value in values.items() if name not in of_mode}
        origins = self.origins | {name: (value, origin) for name, value in of_mode.items()}
        mode_options = replace(self.mode_options, **of_mode)
        return replace(self, mode_options=mode_options, origins=origins).changed(**of_train)

    @property
    def settings(self) -> list["Config"]:
        """The configuration with each combination of the values to try; --lr auto has the mode's default here."""
        lists = {name: values for name, values in self.search.items() if values != AUTO}
        combinations = itertools.product(*lists.values())  # without lists one, which is empty
        return [self.with_options(dict(zip(lists, values, strict=True)), SEARCHED) for values in combinations]

    @property
    def resume_changes(self) -> list[str]:
        """The options that this or an earlier --resume changed."""
        return [name for name, (_, origin) in self.origins.items() if origin == ON_RESUME]


def make_parser(description: str, mode_options: dict[str, type]) -> Parser:
    """The command line of train.py. mode_options: the options of each mode."""
    parser = Parser(prog="train.py", description=description)
    add_options(parser, "training", TrainOptions, {"lr": parse_rates})
    add_options(parser, "data", DataOptions)
    for name, options in mode_options.items():
        add_options(parser, f"mode {name}", options, list_parsers(options))
    return parser


def parse(arguments: list[str], description: str) -> list[Config]:
    """The command line as one configuration for each mode to run. Raises UserError."""
    mode_options = {name: mode.Options for name, mode in modes.MODES.items()}
    args = make_parser(description, mode_options).parse_args(arguments)
    if args.resume:
        return resume(args)
    adapter = read_adapter(args) if args.adapter is not None else None
    mode_arg = args.mode
    if mode_arg is None:
        mode_arg = "all" if args.plan else TrainOptions.mode
    chosen = [adapter.mode] if adapter else modes.parse_modes(mode_arg)
    check_flags(args, chosen)
    return [make_config(args, mode, adapter) for mode in chosen]


def list_parsers(options: type) -> dict[str, Any]:
    """The parsers of a mode's numeric options, which also take a list."""
    kinds = {own.name: value_type(options, own.name) for own in fields(options)}
    return {name: parse_list(PARSERS[kind]) for name, kind in kinds.items() if kind in PARSERS}


def resume(args: argparse.Namespace) -> list[Config]:
    """The configurations of a run's folder, or of a comparison's, with the options that extend it."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    others = sorted(given.keys() - {"resume", "debug", *EXTENDING})
    if others:
        raise UserError("--resume continues with the options that the run was started with: leave out "
                        f"{flag(others[0])}; only --epochs, --steps and --patience may change")
    changes = {name: (given[name], ON_RESUME) for name in EXTENDING if name in given}
    configs = []
    for config in broadcast(lambda: load_all(Path(args.resume))):
        config = replace(config.changed(**changes), extended=bool(changes))
        if "epochs" in changes and "steps" not in changes:
            config = config.changed(steps=(None, ON_RESUME))  # the steps of before would count, and not the epochs
        check_bounds(config.train)
        if config.train.adapter and (config.search or config.train.seeds > 1):  # some of its runs begin only now
            config = replace(config, adapter=load_adapter(config.train.adapter, config.train.model))
        configs.append(replace(config, train=replace(config.train, resume=args.resume, out=args.resume)))
    return configs


def load_adapter(folder: str, model: str) -> Tuned:
    return read_tuned(Path(folder), weights.load_on_meta(model).model.config)


def read_adapter(args: argparse.Namespace) -> Tuned:
    """The content of --adapter, which determines the mode and its options. Raises UserError."""
    adapter = load_adapter(args.adapter, args.model or str(TINY))
    for name, value in asdict(adapter.options).items():
        if getattr(args, name, None) is not None:
            raise UserError(f"{flag(name)}: --adapter {args.adapter} has {value}: leave {flag(name)} out")
    if args.mode not in (None, adapter.mode):
        raise UserError(f"--mode {args.mode}: --adapter {args.adapter} is of mode {adapter.mode}: leave --mode out")
    return adapter


def check_flags(args: argparse.Namespace, chosen: list[str]) -> None:
    """Refuse flags that the chosen modes, or the other flags, give no meaning to."""
    owners: dict[str, list[str]] = {}  # {option: the modes that have it}
    for name, mode in modes.MODES.items():
        for own in fields(mode.Options):
            owners.setdefault(own.name, []).append(name)
    for name, having in owners.items():
        if getattr(args, name, None) is not None and not set(having) & set(chosen):
            raise UserError(f"{flag(name)} belongs to mode {' or '.join(having)}, and this run is "
                            f"{', '.join(chosen)}: leave it out or change --mode")
    if args.kernel and not any(modes.MODES[mode].uses_kernel for mode in chosen):
        raise UserError("--kernel is about low-rank updates, and this run is "
                        f"{', '.join(chosen)}: leave it out or change --mode")
    if args.shard and (args.plan or WORLD_SIZE == 1):
        raise UserError("--shard spreads a run over several processes: torchrun --nproc-per-node N train.py "
                        "...; --plan knows a process that holds the whole model")
    if args.model and not args.data and not args.plan:
        raise UserError("--model needs --data FILE_OR_FOLDER: the embedded pairs belong to the embedded base")


def make_config(args: argparse.Namespace, mode: str, adapter: Tuned | None) -> Config:
    """One mode's configuration: the command line, else the embedded base's settings, else the defaults."""
    record = modes.MODES[mode]
    names = {known.name for known in (*fields(TrainOptions), *fields(record.Options))}
    search = {name: value for name, value in vars(args).items() if isinstance(value, tuple) and name in names}
    # one value for now: the first of a list, and for auto the default
    single = {name: None if values == AUTO else values[0] for name, values in search.items()}
    args = argparse.Namespace(**vars(args) | single)
    defaults = {"lr": (record.lr, f"{mode}'s default"), "weight_decay": (record.weight_decay, f"{mode}'s default")}
    embedded: dict[str, tuple[Any, str]] = {"data": (str(TINY / "pairs"), "embedded")}
    if not args.model:
        embedded |= {"model": (str(TINY), "embedded"), "general": (str(TINY / "general.txt"), "embedded")}
        defaults["lr"] = (record.embedded_lr, "embedded")
    if not args.data and not args.steps:
        embedded |= {"epochs": (0.8, "embedded"), "val_rows": (100, "embedded")}  # enough, as measured
    from_adapter: dict[str, tuple[Any, str]] = {}
    if adapter:
        embedded["mode"] = (mode, "adapter")
        from_adapter = {name: (value, "adapter") for name, value in asdict(adapter.options).items()}
    train, train_origins = resolve(TrainOptions, args, embedded | defaults)
    data, data_origins = resolve(DataOptions, args, embedded)
    mode_options, mode_origins = resolve(record.Options, args, from_adapter)
    origins = train_origins | data_origins | mode_origins
    origins |= {name: (origins[name][0], SEARCHED) for name in search}
    config = Config(mode, train, data, mode_options, origins, search, adapter=adapter)
    for setting in config.settings:
        check_bounds(setting.train)
        check_bounds(setting.mode_options)
    return config


def describe(config: Config) -> str:
    """The configuration as lines of `name = value (origin)`, with the defaults last, in one line."""
    lines, defaults = [f"mode {config.mode}"], []
    for name, (value, origin) in config.origins.items():
        if origin == SEARCHED:
            tried = ", ".join(map(str, config.search[name]))
            lines.append(f"  {name} = {tried}  (to try; the validation loss decides)")
        elif origin != "default" and value is not None:
            lines.append(f"  {name} = {value}  ({origin})")
        elif value is not None:
            defaults.append(f"{name} {value}")
    return "\n".join([*lines, f"  by default: {', '.join(defaults)}"])


def save(folder: Path, config: Config) -> None:
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {
        "mode": config.mode, "train": asdict(config.train), "data": asdict(config.data),
        "mode_options": asdict(config.mode_options), "origins": config.origins, "search": config.search,
        "part": config.part})


def load(folder: Path) -> Config:
    """The configuration that `save` wrote; options that the file lacks have their defaults. Raises UserError when
    the folder is not a run's, or the options are not this version's."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.json")
    raw = read_json(path, dict)
    try:
        mode_options = raw.get("mode_options", raw.get("own"))  # "own": the name in an earlier version
        train = from_json(TrainOptions, drop_removed_options(raw["train"], path), str(path))
        data = from_json(DataOptions, raw["data"], str(path))
        mode_options = from_json(modes.MODES[raw["mode"]].Options, mode_options, str(path))
        origins = {name: (value, origin) for name, (value, origin) in raw["origins"].items()}
        search = {name: tuple(values) for name, values in raw.get("search", {}).items()}
        if None in (train.model, train.lr, train.weight_decay):
            raise ValueError("model, lr and weight_decay must not be null")
        if not all(type(value) in (int, float) for values in search.values() if values != AUTO for value in values):
            raise ValueError("search must have numbers")
        config = Config(raw["mode"], train, data, mode_options, origins, search, str(raw.get("part", "")))
        settings = [config, *config.settings]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}") from None
    try:
        for setting in settings:
            for options in (setting.train, setting.data, setting.mode_options):
                check_bounds(options)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    return config


def load_all(folder: Path) -> list[Config]:
    """The run of a folder, or all runs of a comparison, whose compare.json names their modes. Raises UserError."""
    path = folder / COMPARE
    if not path.is_file():
        config = load(folder)
        if config.part:
            raise UserError(f"{folder} is a part of a run, {config.part}: --resume continues the whole run")
        if config.mode != config.train.mode and (folder.parent / COMPARE).is_file():
            raise UserError(f"{folder} is part of a comparison: --resume {folder.parent} continues all of it")
        return [config]
    try:
        chosen = [result["mode"] for result in read_json(path, list)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}") from None
    return [load(folder / mode) for mode in chosen if mode in modes.MODES]
