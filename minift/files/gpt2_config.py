"""GPT-2's config.json as a GPTConfig: every field that changes the computation is read or refused.

Field names and defaults are those of transformers' GPT2Config.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from minift.errors import UserError
from minift.files.atomic import read_json
from minift.model.gpt import ACTIVATIONS, GPTConfig

MAX_LAYERS = 1000  # a file that asks for a billion layers would fill the memory with modules
OWN_TYPE = "minift"  # model_type of a saved model whose configuration has more than GPT-2's fields

# the fields of GPTConfig that transformers' GPT2Config has, too
GPT2_FIELDS = {
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
    "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "eos_token_id",
}  # fmt: skip

OTHER_NAMES = {  # GPT2Config accepts these too
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
OTHER_ACTIVATIONS = {  # transformers' further names for a function in ACTIVATIONS, equal up to rounding
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}

# Parts of names that speak of an architecture. A field with such a name that GPT-2 does not have is refused:
# transformers ignores it, and computes another model than the file describes.
ARCHITECTURE = re.compile(
    r"attn|attention|head|layer|emb|hidden|position|rope|rotary|alibi|norm|activation|inner|ffn|mlp|window"
    r"|expert|residual|qkv|scal|epsilon|bias|quantization|sparse|^[nd]_|_ctx|seq_len|block_size"
)
HARMLESS = {  # fields with such a name that change no logits
    "n_ctx", "n_special", "output_attentions", "output_hidden_states", "reorder_and_upcast_attn",
    "tie_word_embeddings", "cross_attention_hidden_size", "chunk_size_feed_forward", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "head_type",
    "keys_to_ignore_at_inference", "output_router_logits", "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32", "renormalize_logits", "sequence_bias",
}  # fmt: skip
# Values with which a field has no effect. "absolute" is the kind of position embedding that GPT-2 has.
OFF = (None, False, 0, "", [], {}, "absolute")


def read_config(folder: Path) -> tuple[GPTConfig, dict[str, Any]]:
    """The configuration of a model's folder, and its parsed config.json. Raises UserError."""
    path = folder / "config.json"
    raw = read_json(path, dict)
    return parse_config(raw, str(path)), raw


def parse_config(raw: dict[str, Any], where: str) -> GPTConfig:
    """A parsed config.json as a GPTConfig; errors begin with `where`.

    eos_token_id is not read here, see special_tokens.end_of_text. Raises UserError for anything but a GPT-2.
    """
    check_model_type(raw, where)
    raw = use_gpt2_names(raw, where)
    values = {}
    for field in dataclasses.fields(GPTConfig):
        if field.name != "eos_token_id":
            values[field.name] = check_value(field, raw.get(field.name, field.default), where)
    check_unknown_fields(raw, values, where)

    name = values["activation_function"]
    name = values["activation_function"] = OTHER_ACTIVATIONS.get(name, name)
    if name not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *OTHER_ACTIVATIONS])
        raise UserError(f"{where}: activation_function {name!r:.80} is not known here; known: {known}")
    config = GPTConfig(**values)
    if config.n_embd % config.n_head:
        raise UserError(f"{where}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    if config.n_layer > MAX_LAYERS:
        raise UserError(f"{where}: n_layer is {config.n_layer}, and can be at most {MAX_LAYERS}")
    return config


def check_model_type(raw: dict[str, Any], where: str) -> None:
    """Raises UserError if a config.json is of another architecture."""
    kind = raw.get("model_type")
    if kind in ("gpt2", OWN_TYPE):
        return
    if kind is None:  # old files have GPT-2's fields and no model_type
        architectures = raw.get("architectures")
        classes = architectures if isinstance(architectures, list) else []
        if "n_embd" in raw or any(str(name).startswith("GPT2") for name in classes):
            return
    raise UserError(f"{where}: model_type is {kind!r:.80}, and only 'gpt2' can be loaded")


def use_gpt2_names(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The same fields under GPT-2's names: n_embd for hidden_size, and so on. Raises UserError."""
    result = dict(raw)
    for other, name in OTHER_NAMES.items():
        if other not in result:
            continue
        value = result.pop(other)
        if result.setdefault(name, value) != value:
            both = f"{other} {value!r:.80} contradicts {name} {result[name]!r:.80}"
            raise UserError(f"{where}: {both}: keep the right one")
    return result


def check_value(field: dataclasses.Field, value: Any, where: str) -> Any:
    """A field's value if its type and range are right. Raises UserError."""
    if field.type is int:
        wanted = "a positive integer"
        right = type(value) is int and value > 0
    elif field.type == int | None:
        wanted = "a positive integer or null"
        right = value is None or type(value) is int and value > 0
    elif field.type is float:
        wanted = "a number, 0 or more"
        right = type(value) in (int, float) and 0 <= value < math.inf
    elif field.type is bool:
        wanted = "true or false"
        right = type(value) is bool
    else:
        wanted = "a string"
        right = isinstance(value, str)
    if not right:
        raise UserError(f"{where}: {field.name} is {value!r:.80}, and must be {wanted}")
    return value


def check_unknown_fields(raw: dict[str, Any], known: dict[str, Any], where: str) -> None:
    """Raises UserError for a field that may change the computation and is not one of GPT-2's."""
    if raw.get("add_cross_attention"):
        raise UserError(f"{where}: add_cross_attention is set, and this is a decoder-only GPT-2")
    for name, value in raw.items():
        harmless = name in known or name in HARMLESS or name.startswith("summary_") or "drop" in name
        if not harmless and value not in OFF and ARCHITECTURE.search(name):
            raise UserError(f"{where}: {name:.80} is {value!r:.80}; GPT-2 has no such field: if it does not "
                            "change the computation, remove it from the file")


def saved_config(raw: dict[str, Any], config: GPTConfig, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json of a saved model. `raw` is the config.json of its base, whose other fields are kept.

    The model_type is gpt2 only if GPT-2's fields describe the model. A reader who adds a field to GPTConfig, and uses
    it, gets another model_type, which transformers refuses.
    """
    result = {name: value for name, value in raw.items() if name not in OTHER_NAMES}
    result.pop("torch_dtype", None)  # the older name of dtype
    result |= {"dtype": "float32", "tie_word_embeddings": True}
    is_gpt2 = True
    for name, value in dataclasses.asdict(config).items():
        if name in GPT2_FIELDS:
            result[name] = value
        elif value not in OFF:
            result[name] = value
            is_gpt2 = False
    result["model_type"] = "gpt2" if is_gpt2 else OWN_TYPE
    result["architectures"] = ["GPT2LMHeadModel" if is_gpt2 else "GPT"]
    # a base may list several end-of-text tokens: the list is kept if it has the one that was trained
    kept = raw.get("eos_token_id")
    is_kept = eos_token_id is None or kept == eos_token_id or isinstance(kept, list) and eos_token_id in kept
    result["eos_token_id"] = kept if is_kept else eos_token_id
    return result
