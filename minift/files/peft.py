"""PEFT's folders in and out: adapter_config.json and adapter_model.safetensors (older: adapter_model.bin).

LoRA and prompt tuning, in the format of peft 0.21; older versions write fewer fields. A field that changes the result
and is not supported is refused by its name. CONVERSIONS, at the end, lists the types of PEFT that are supported.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minift import modes
from minift.errors import UserError
from minift.files import atomic, safetensors
from minift.files.weights import FLOATS, make_folder, read_bin
from minift.model.gpt import GPT, GPTConfig
from minift.modes import lora, prompt
from minift.options import check_bounds, from_json

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Names of tensors: base_model.model.transformer.h.0.attn.c_attn.lora_A.weight
PREFIX = "base_model.model."  # of every module of the base
LM_HEAD_PREFIX = "transformer."  # follows if the base was a GPT2LMHeadModel, and is missing if it was a GPT2Model
MAX_REPEATS = 6  # of *, + and { in one regular expression

# fields that change no result: about the file, or about how training began
IGNORED = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping",
    "inference_mode", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "velora_config", "ensure_weight_tying", "qalora_group_size", "megatron_core",
}  # fmt: skip
OFF = (None, False, 0, "", [], {})  # with these values a field has no effect, so any field may have them


@dataclass(frozen=True)
class LoraFields:
    """The supported fields of a PEFT LoraConfig, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = True  # the base's weight is (in, out); no matter for the update, which is A and B
    bias: str = "none"
    init_lora_weights: bool | str = True
    target_modules: list | str = field(default_factory=lambda: ["c_attn"])
    exclude_modules: list | str = ""
    layers_to_transform: list | int = field(default_factory=list)
    layers_pattern: list | str = ""
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFields:
    """The supported fields of a PEFT PromptTuningConfig. Those about the base and about the start of the prompt change
    no result: the tensor of the prompt has all of it."""

    num_virtual_tokens: int = 0
    token_dim: int = 0
    num_transformer_submodules: int = 1
    num_attention_heads: int = 0
    num_layers: int = 0
    prompt_tuning_init: str = ""
    prompt_tuning_init_text: str = ""
    tokenizer_name_or_path: str = ""
    tokenizer_kwargs: dict = field(default_factory=dict)


def is_folder(folder: Path) -> bool:
    """Whether a folder is PEFT's. Ask before looking for config.json, which such a folder may have, too."""
    return (folder / CONFIG).is_file()


def save(folder: Path, model: GPT, mode: str, base_name: str) -> None:
    """Write the parameters that `mode` tuned as a PEFT folder, in fp32.

    `folder` must be new or empty; `base_name` is written for PEFT. Raises UserError.
    """
    peft_type = modes.MODES[mode].peft_type
    if peft_type is None:
        supported = " or ".join(name for name, other in modes.MODES.items() if other.peft_type is not None)
        raise UserError(f"a PEFT folder can hold what {supported} tunes, and mode {mode} tunes something "
                        "else")
    fields, tensors = CONVERSIONS[peft_type].save(model)
    missing = modes.tuned_parameters(model).keys() - tensors.keys()
    if missing:
        raise UserError(f"PEFT's {peft_type} has no place for {min(missing)}, which mode {mode} tunes")
    about = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
             "inference_mode": True}
    make_folder(folder)
    named = {name: tensor.float().contiguous() for name, tensor in tensors.values()}
    safetensors.write(folder / TENSORS, named, {"format": "pt"})
    atomic.write_json(folder / CONFIG, about | fields)


def read(folder: Path, config: GPTConfig) -> tuple[str, Any, dict[str, Tensor]]:
    """A PEFT folder as a mode's name, its options and its tuned tensors, for a base with this configuration.

    Raises UserError, with the name of the field or tensor that is damaged or not supported.
    """
    where = str(folder / CONFIG)
    raw = atomic.read_json(folder / CONFIG, dict)
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in CONVERSIONS:
        raise UserError(f"{where}: peft_type is {peft_type!r:.60}, and can be {', '.join(CONVERSIONS)} here")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{where}: task_type is {raw['task_type']!r:.60}, and GPT-2 here is a CAUSAL_LM")
    conversion = CONVERSIONS[peft_type]
    fields = {}  # that are supported; null means PEFT's default
    for name, value in raw.items():
        if name in conversion.Fields.__dataclass_fields__:
            if value is not None:
                fields[name] = value
        elif name not in IGNORED and value not in OFF:
            raise UserError(f"{where}: {name:.80} is {value!r:.60}, which is not supported here")
    tensors = read_tensors(folder)
    options, tensors = conversion.read(config, from_json(conversion.Fields, fields, where), tensors, where)
    try:
        check_bounds(options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return conversion.mode, options, tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors in fp32, under their names without PREFIX. Raises UserError."""
    path = folder / TENSORS
    if not path.is_file() and (folder / OLD_TENSORS).is_file():
        path = folder / OLD_TENSORS
        tensors = read_bin(path)
    else:
        tensors = safetensors.read(path)[0]
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            raise UserError(f"{path}: {name:.80} is {tensor.dtype}, or not finite; it must be fp32, fp16 or "
                            "bf16")
        result[name.removeprefix(PREFIX)] = tensor.float()
    return result


# ---- LoRA


def save_lora(model: GPT) -> tuple[dict[str, Any], dict[str, tuple[str, Tensor]]]:
    """A LoraConfig's fields, and {our name: (PEFT's name, tensor)}.

    Here q, k and v of c_attn have updates of their own; PEFT has one update of c_attn. So the A of, say, q and v become
    one A of twice the rank, whose B is zero where it must be. Alpha is doubled too, so that alpha / rank is the same.
    """
    layers = lora.lora_layers(model)
    # name -> (rank, alpha)
    values = {name: (len(layer.lora_A), layer.scale * len(layer.lora_A)) for name, layer in layers.items()}
    (rank, alpha), others = most_common_pattern(values, model.config.n_layer)
    targets = []
    for module in lora.TARGET_MODULES:
        if sum(name.endswith(module) for name in layers) == model.config.n_layer:
            targets.append(module)  # in every block
    targets += [name for name in layers if not name.endswith(tuple(targets))]  # full names of all others
    fields = {
        "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none", "fan_in_fan_out": True,
        "lora_dropout": next(iter(layers.values())).dropout, "use_rslora": False,
        # the same keys in both, as older versions of PEFT expect
        "rank_pattern": {key: rank for key, (rank, _) in others.items()},
        "alpha_pattern": {key: alpha for key, (_, alpha) in others.items()},
    }  # fmt: skip
    tensors = {}
    for name, layer in layers.items():
        peft_name = f"{PREFIX}{LM_HEAD_PREFIX}{name}"
        tensors[f"{name}.lora_A"] = f"{peft_name}.lora_A.weight", layer.lora_A
        tensors[f"{name}.lora_B"] = f"{peft_name}.lora_B.weight", layer.full_B()
    return fields, tensors


def read_lora(config: GPTConfig, fields: LoraFields, tensors: dict[str, Tensor], where: str
              ) -> tuple[lora.Options, dict[str, Tensor]]:
    """Options and tensors of mode lora. Raises UserError."""
    check_lora_fields(fields, where)
    names = [f"h.{layer}.{module}" for layer in range(config.n_layer) for module in lora.TARGET_MODULES]
    # patterns are matched with the full names that PEFT saw
    prefix = LM_HEAD_PREFIX if any(name.startswith(LM_HEAD_PREFIX) for name in tensors) else ""
    chosen = [name for name in names if is_target(fields, prefix + name, where)]
    if not chosen:
        raise UserError(f"{where}: target_modules {fields.target_modules!r:.80}, layers_pattern "
                        f"{fields.layers_pattern!r:.40} and the like choose no matrix of GPT-2's blocks; "
                        f"there are {', '.join(lora.TARGET_MODULES)}")

    tuned = {}  # tensors by our names: h.0.attn.c_attn.lora_A
    for name, tensor in tensors.items():
        short = name.removeprefix(LM_HEAD_PREFIX).removesuffix(".weight")
        if short.rpartition(".")[0] not in names:
            raise UserError(f"{where}: {short:.80} updates none of {', '.join(lora.TARGET_MODULES)} in this base's "
                            f"{config.n_layer} blocks, and cannot be used here")
        tuned[short] = tensor

    values = dict.fromkeys(names, (0, 0.0))  # name -> (rank, alpha); rank 0: no update
    for name in chosen:
        rank = pattern_value(fields.rank_pattern, prefix + name, fields.r, where)
        alpha = pattern_value(fields.alpha_pattern, prefix + name, fields.lora_alpha, where)
        A = tuned.get(f"{name}.lora_A")  # (r, in)
        if A is None or A.dim() != 2 or len(A) != rank or rank is True:  # JSON's true equals 1 in Python
            found = "missing" if A is None else tuple(A.shape)
            raise UserError(f"{where}: the rank of {name} is {rank!r:.40}, and its lora_A is {found}")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise UserError(f"{where}: the alpha of {name} is {alpha!r:.40}, and must be a number above 0")
        values[name] = rank, float(alpha)

    # a target is updated in every block; the blocks that were not chosen get rank 0 by a pattern
    targets = [module for module in lora.TARGET_MODULES if any(name.endswith(module) for name in chosen)]
    used = {name: value for name, value in values.items() if name.endswith(tuple(targets))}
    (rank, alpha), others = most_common_pattern(used, config.n_layer)
    ranks = ",".join(f"{key}={rank}" for key, (rank, _) in others.items())
    alphas = ",".join(f"{key}={alpha}" for key, (_, alpha) in others.items() if alpha)
    options = lora.Options(rank=rank, alpha=alpha, dropout=fields.lora_dropout, rank_pattern=ranks or None,
                           alpha_pattern=alphas or None,
                           scaling="rslora" if fields.use_rslora else "standard",
                           targets=",".join(lora.TARGET_MODULES[module] for module in targets))
    return options, tuned


def check_lora_fields(fields: LoraFields, where: str) -> None:
    """Raises UserError for fields that are not supported, and for combinations that PEFT refuses."""
    if fields.bias != "none":
        raise UserError(f"{where}: bias is {fields.bias!r:.40}: tuned biases are not supported here")
    if fields.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(f"{where}: init_lora_weights {fields.init_lora_weights!r:.40} changes the base's own "
                        "weights, and this base is unchanged: convert it to plain LoRA with PEFT")
    if isinstance(fields.target_modules, str) and (fields.layers_to_transform != [] or fields.layers_pattern):
        raise UserError(f"{where}: layers_to_transform and layers_pattern need a list as target_modules")
    if fields.layers_pattern and fields.layers_to_transform == []:
        raise UserError(f"{where}: layers_pattern {fields.layers_pattern!r:.40} needs layers_to_transform")


def most_common_pattern(values: dict[str, tuple[int, float]], n_layer: int
                ) -> tuple[tuple[int, float], dict[str, tuple[int, float]]]:
    """The most common (rank, alpha), and the others: of a kind of matrix in all blocks, or of single layers by name.

    `values`: name of a layer -> (rank, alpha).
    """
    common = Counter(value for value in values.values() if value[0]).most_common(1)[0][0]
    others = {}
    for module in lora.TARGET_MODULES:
        here = {name: value for name, value in values.items() if name.endswith(module)}
        if len(here) == n_layer and len(set(here.values())) == 1:
            here = {module: here[f"h.0.{module}"]}  # one entry for all blocks
        others |= {key: value for key, value in here.items() if value != common}
    return common, others


def is_target(fields: LoraFields, name: str, where: str) -> bool:
    """Whether PEFT would update the module with this full name: check_target_module_exists in its tuners_utils.py.

    Raises UserError for a pattern that cannot be used.
    """
    excluded, targets = fields.exclude_modules, fields.target_modules
    if excluded and is_named(excluded, name, where):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or is_named(targets, name, where)
    if name in targets:
        return True  # a full name, for which PEFT does not look at the layers
    layers = fields.layers_to_transform
    if layers == [] or not is_named(targets, name, where):
        return is_named(targets, name, where)

    patterns = fields.layers_pattern if isinstance(fields.layers_pattern, list) else [fields.layers_pattern]
    # the number of the block, in the first pattern that matches, must be one of `layers`
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns if pattern]
    for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
        match = compile_pattern(expression, where).match(name)
        if match:
            return int(match[match.lastindex]) in (layers if isinstance(layers, list) else [layers])
    return False


def is_named(modules: list | str, name: str, where: str) -> bool:
    """Whether `modules` names a module: a string is a regular expression of the full name, a list holds its ends."""
    if isinstance(modules, str):
        return compile_pattern(modules, where).fullmatch(name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def pattern_value(patterns: dict[str, Any], name: str, default: Any, where: str) -> Any:
    """The value of the first pattern that matches a module's full name (PEFT's get_pattern_key)."""
    for key, value in patterns.items():
        if compile_pattern(rf"(.*\.)?({key})$", where).match(name):
            return value
    return patterns.get(name, default)


def compile_pattern(pattern: str, where: str) -> re.Pattern:
    """A regular expression of a file. Raises UserError, also for one that could run for hours."""
    # nested repeats such as (a+)+ take exponential time, n repeats in a row a time of length ** n
    if len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise UserError(f"{where}: {pattern!r:.80} repeats too much for a regular expression of names")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r:.80} is no regular expression: {error}") from None


# ---- prompt tuning


def save_prompt(model: GPT) -> tuple[dict[str, Any], dict[str, tuple[str, Tensor]]]:
    """A PromptTuningConfig's fields, and {our name: (PEFT's name, tensor)}."""
    config = model.config
    fields = {
        "num_virtual_tokens": model.prompt_tokens, "token_dim": config.n_embd,
        "num_attention_heads": config.n_head, "num_layers": config.n_layer,
        "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    return fields, {"prompt.weight": ("prompt_embeddings", model.prompt.weight)}  # (prompt_tokens, C)


def read_prompt(config: GPTConfig, fields: PromptFields, tensors: dict[str, Tensor], where: str
                ) -> tuple[prompt.Options, dict[str, Tensor]]:
    """Options and tensors of mode prompt. Raises UserError."""
    expected = {"prompt_embeddings": (fields.num_virtual_tokens, config.n_embd)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if fields.num_transformer_submodules != 1 or found != expected:
        raise UserError(f"{where}: there must be prompt_embeddings {expected['prompt_embeddings']} in one "
                        "submodule, as many as num_virtual_tokens and as wide as this base; there is "
                        f"{str(found):.200} in {fields.num_transformer_submodules}")
    options = prompt.Options(prompt_tokens=fields.num_virtual_tokens, prompt_init="noise")
    return options, {"prompt.weight": tensors["prompt_embeddings"]}


# ---- the types of PEFT


@dataclass(frozen=True)
class Conversion:
    """How a peft_type is read and written."""

    mode: str  # of this project
    Fields: type  # a dataclass of the supported fields
    save: Callable[..., Any]  # save_lora shows the arguments, read_lora those of `read`
    read: Callable[..., Any]


CONVERSIONS = {
    "LORA": Conversion("lora", LoraFields, save_lora, read_lora),
    "PROMPT_TUNING": Conversion("prompt", PromptFields, save_prompt, read_prompt),
}
