"""The tuning modes: one file each, one line each in NAMES.

A mode changes three things: which modules are added, which parameters train, and so what is saved. Its file
defines `MODE`, a record (minift/modes/mode.py). The rest of the program reads records and never asks for a mode
by name. The contract:

- `apply(model, options)` gets a model whose parameters are all frozen. It adds modules, or replaces layers, and
  unfreezes the parameters that train. The optimizer gets these parameters, and a tuned file holds them.
- `apply` runs on the meta device, to check the options and to predict the memory, and on the real model. Tensors on
  the meta device have no values, so `apply` must not read any (`.item()`, `if tensor`). It creates new parameters on
  the device of the layer that they extend. In train.py the weights are fp32, in eval.py they are
  already in the compute dtype: initial values computed from them differ by rounding, but a tuned file replaces them.
- New parameters are fp32. A layer casts them to the dtype of its input at each use.
- Only parameters that train are saved. A tensor that a mode adds and that does not train must follow from the options
  alone, drawn with a generator of its own: eval.py does not set the seed of a run. Register it as a buffer, or as a
  parameter with `requires_grad=False`; several layers may share it.
- A mode that updates linear layers finds them with `lora.target_layers` and replaces them with `lora.replace_layer`.
- A mode that needs positions in front of each row sets `model.prompt_tokens`, and fills `model.prompt` (one
  embedding for each position) or `block.attn.prefix` in every block (keys and values for each position).
  Adapters go to `block.attn_adapter` and `block.mlp_adapter`. Everything else replaces a `Linear`.
- A parameter without weight decay gets `parameter.no_decay = True`. Vectors (biases, norms) never decay.
- A layer that derives a tensor from its parameters alone (a norm, a cast) may keep it between `set_constant(True)`
  and `set_constant(False)`, which decoding calls. See `Linear.set_constant`.
- A layer that computes differently in each row adds itself to `model.per_row_layers`.
- Wrong options raise UserError with the flag, the reason and a remedy. Any other exception is a bug of the mode
  and is shown with its traceback.
- Two modes may have a flag of the same name and type, such as --rank. `--mode all --rank 8` then sets it in both.
- `merge`, where there is one, leaves a model that computes as before in GPT-2's own weights; a mode without it says
  the reason in `why_no_merge`.

The tests run every mode: add its smallest options and a learning rate to MODES in tests/scripts.py.
"""

from importlib import import_module
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minift.distributed import copy_from_rank0
from minift.errors import UserError
from minift.model.gpt import GPT, compare_shapes
from minift.modes.mode import Mode

NAMES = (  # the registry: the name of a mode is also the name of its file
    "full",
    "selective",
    "lora",
    "prompt",
    "adapter",
)
MODES: dict[str, Mode] = {name: import_module(f"{__name__}.{name}").MODE for name in NAMES}


def parse_modes(text: str) -> list[str]:
    """A comma list of modes, or "all". Raises UserError."""
    names = list(MODES) if text == "all" else text.split(",")
    for name in names:
        if name not in MODES or names.count(name) > 1:
            raise UserError(f"--mode {text}: unknown or repeated mode {name!r}; there are {', '.join(MODES)}, "
                            "and all")
    return names


def apply(model: GPT, mode: str, options: Any) -> None:
    """Freeze the model, then let the mode add modules and unfreeze parameters. Raises UserError for options
    that cannot be used with this model."""
    model.requires_grad_(False)
    MODES[mode].apply(model, options)
    model.train(model.training)  # a new module is in training mode: give it the state of the model


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that trains, by name. The optimizer gets them, and a tuned file holds them."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_tuned(model: GPT, tensors: dict[str, Tensor], source: str) -> None:
    """Raises UserError, with every difference, unless the names and shapes of a tuned file are those of the parameters
    that train in this model. `source` names the file."""
    expected = {name: p.shape for name, p in tuned_parameters(model).items()}
    if faults := compare_shapes(expected, {name: t.shape for name, t in tensors.items()}):
        raise UserError(f"{source} does not fit the model and options it names: {'; '.join(faults)}")


def load_tuned(model: GPT, tensors: dict[str, Tensor], source: str) -> None:
    """Copy the tensors of a tuned file into a model to which the same mode was applied. Raises as check_tuned does."""
    check_tuned(model, tensors, source)
    for name, parameter in tuned_parameters(model).items():
        copy_from_rank0(parameter, tensors[name])


def merge(model: GPT, mode: str) -> None:
    """Turn the tuned model into a plain GPT-2 with the same outputs, to be saved as one. Raises UserError, with the
    reason of the mode, if that is impossible."""
    with torch.device("meta"):  # names alone, without memory
        gpt2_names = set(GPT(model.config).state_dict())
    if set(tuned_parameters(model)) <= gpt2_names:
        return  # the mode has added no parameters
    record = MODES[mode]
    if record.merge is None:
        raise UserError(record.why_no_merge or f"mode {mode} adds parameters and has no merge")
    record.merge(model)


def describe(model: GPT, mode: str, tokenizer: Tokenizer) -> list[str]:
    """Lines about the learned parameters; by default their names, shapes and norms."""
    record = MODES[mode]
    if record.describe is not None:
        return record.describe(model, tokenizer)
    lines = []
    for name, parameter in tuned_parameters(model).items():
        lines.append(f"{name} {tuple(parameter.shape)} norm {parameter.norm().item():.4g}")
    return lines
