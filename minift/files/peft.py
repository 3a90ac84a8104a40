"""PEFT's folders in and out: adapter_config.json and adapter_model.safetensors (older: adapter_model.bin).

What a config says of one method, and what its tensors are called, stands with the mode: `PEFT_TYPE`,
`PeftFields`, `to_peft` and `from_peft` in lora.py and prompt.py. Format: peft 0.21; older configs have fewer
fields, and newer ones may have more: those must be off.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from minift import modes
from minift.errors import UserError
from minift.files import safetensors
from minift.files.atomic import write_text
from minift.files.weights import FLOATS, make_folder, read_bin, read_json
from minift.model.gpt import GPT

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every name that PEFT gives to a base's module
ABOUT = {"peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping",
         "inference_mode", "runtime_config"}  # fields that change no result


def peft_types() -> dict[str, str]:
    """{PEFT's name of a method: ours}."""
    return {module.PEFT_TYPE: mode for mode, module in modes.MODES.items() if hasattr(module, "PEFT_TYPE")}


def is_folder(folder: Path) -> bool:
    """Whether a folder is PEFT's; it may have the base's config.json too, which makes it no run's."""
    return (folder / CONFIG).is_file()


def save(folder: Path, model: GPT, mode: str, base: str) -> None:
    """What `mode` tuned as a PEFT folder, which must be new or empty, in fp32. Raises UserError when PEFT has
    no such thing."""
    if not hasattr(modes.MODES[mode], "to_peft"):
        raise UserError(f"a PEFT folder can hold what {' or '.join(peft_types().values())} tunes, and mode "
                        f"{mode} tunes something else")
    fields, tensors = modes.MODES[mode].to_peft(model)
    about = {"peft_type": modes.MODES[mode].PEFT_TYPE, "task_type": "CAUSAL_LM",
             "base_model_name_or_path": base, "inference_mode": True}
    make_folder(folder)
    named = {PREFIX + name if "." in name else name: t.float().contiguous() for name, t in tensors.items()}
    safetensors.write(folder / TENSORS, named, {"format": "pt"})
    text = json.dumps(about | fields, indent=2) + "\n"
    write_text(folder / CONFIG, text)


def read(folder: Path, model: GPT) -> tuple[str, Any, dict[str, Tensor]]:
    """A PEFT folder as a mode, its options and its tuned tensors. `model` gives the base's shape; it may be
    blank. Raises UserError for what is damaged or cannot be honoured, and names it."""
    where = str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    kinds, kind = peft_types(), raw.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{where}: peft_type is {kind!r:.60}, and can be {', '.join(kinds)} here")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{where}: task_type is {raw['task_type']!r:.60}, and GPT-2 here is a CAUSAL_LM")
    mode = kinds[kind]
    known = modes.MODES[mode].PeftFields.__dataclass_fields__
    off = (None, False, 0, "", [], {})
    fields = {name: value for name, value in raw.items() if name not in ABOUT and value is not None}
    for name, value in fields.items():
        if name not in known and value not in off:
            raise UserError(f"{where}: {name} is {value!r:.60}, which cannot be honoured here")
    fields = {name: value for name, value in fields.items() if name in known}
    path = folder / TENSORS
    if not path.is_file() and (folder / OLD_TENSORS).is_file():
        path, tensors = folder / OLD_TENSORS, read_bin(folder / OLD_TENSORS)
    else:
        tensors = safetensors.read(path)[0]
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            raise UserError(f"{path}: {name:.80} is {tensor.dtype}, or not finite; it must be fp32, "
                            "fp16 or bf16")
    tensors = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    return mode, *modes.MODES[mode].from_peft(model, fields, tensors, where)
