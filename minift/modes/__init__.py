"""The tuning modes: one file each, one line each in NAMES.

A mode changes three things: which modules are added, which parameters train, and so what is saved. Its file
defines `MODE`, a record (minift/modes/mode.py). The rest of the program reads records and never asks for a mode
by name. The contract:

- `apply(model, options)` gets a model whose parameters are all frozen. It adds modules, or puts layers in the
  place of others, and unfreezes the parameters that train. Those are what the optimizer gets and what is saved.
- `apply` runs twice in a run: on the meta device, to check the options and predict the memory, and on the real
  model. So it must not read values of weights on the meta device (`.item()`, `if tensor`), and new parameters
  belong on the device of the layer they extend. In train.py the weights are fp32, in eval.py they are already
  in the compute dtype: initial values computed from them differ by rounding, but a tuned file replaces them.
- New parameters are fp32. A layer casts them to its input's dtype at each use.
- A mode that needs positions in front of each row sets `model.prompt_tokens`, and fills `model.prompt` (one
  embedding for each position) or `block.attn.prefix` in every block (keys and values for each position).
  Adapters go to `block.attn_adapter` and `block.mlp_adapter`. Everything else replaces a `Linear`.
- A parameter that weight decay must spare gets `parameter.no_decay = True`. Vectors (biases, norms) never
  decay.
- A layer that derives something from its parameters alone (a norm, a cast) keeps it between `set_constant(True)`
  and `set_constant(False)`: decoding calls both. See `Linear.set_constant`.
- A layer that computes differently in each row adds itself to `model.per_row_layers`.
- Wrong options raise UserError with the flag, the reason and a remedy. Any other exception is a bug of the mode
  and is shown with its traceback.
- Two modes may have a flag of the same name; the command line shows it once for each mode that has it.
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

NAMES = (  # the registry: a mode's line here is the name of its file
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
    model.train(model.training)  # added modules get the model's state: their dropout is on or off with it


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that trains, by name: what the optimizer gets, and what a tuned file holds."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_tuned(model: GPT, tensors: dict[str, Tensor], source: str) -> None:
    """Raises UserError, with every difference, unless the names and shapes of a tuned file are those that train
    in this model."""
    expected = {name: p.shape for name, p in tuned_parameters(model).items()}
    if faults := compare_shapes(expected, {name: t.shape for name, t in tensors.items()}):
        raise UserError(f"{source} does not fit the model and options it names: {'; '.join(faults)}")


def load_tuned(model: GPT, tensors: dict[str, Tensor], source: str) -> None:
    """Copy a tuned file's tensors into a model to which the same mode was applied. Raises UserError where
    names or shapes differ; `source` names the file."""
    check_tuned(model, tensors, source)
    for name, parameter in tuned_parameters(model).items():
        copy_from_rank0(parameter, tensors[name])


def merge(model: GPT, mode: str) -> None:
    """Turn the tuned model into a plain GPT-2 with the same outputs, so that it can be saved as one. Raises
    UserError, with the mode's reason, where that is impossible."""
    with torch.device("meta"):
        plain = set(GPT(model.config).state_dict())
    if set(tuned_parameters(model)) <= plain:
        return  # only GPT-2's own parameters train
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
