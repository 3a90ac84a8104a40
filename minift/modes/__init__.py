"""The tuning modes, one file each, and what they have in common.

A mode is a module with three names: `Options`, a frozen dataclass whose fields become command-line flags;
`TRAINING`, its measured defaults for lr and weight_decay; and `apply(model, options)`, which injects what the
mode adds to a wholly frozen model and unfreezes what trains. A mode that adds parameters may have
`merge(model)`, which folds them into the base's own weights, or raises UserError with the reason why it
cannot; any mode may have `describe(model)`, lines about what it learned; `peft_type` is PEFT's name
of it, or None (see minift/files/peft.py). Nothing else in the project asks
for a mode by name, but for eval.py's batch of several LoRA files.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from minift import distributed as parallel
from minift.errors import UserError
from minift.model.gpt import GPT, compare_shapes

NAMES = (  # the registry: a mode's line here is the name of its file
    "full",
    "selective",
    "lora",
    "prompt",
    "adapter",
)
MODES = {name: import_module(f".{name}", __name__) for name in NAMES}


def apply(model: GPT, mode: str, options: Any) -> None:
    """Freeze the model, then let the mode inject and unfreeze. Raises UserError for options that cannot be
    honoured."""
    model.requires_grad_(False)
    MODES[mode].apply(model, options)
    model.train(model.training)  # what was injected, dropout too, trains or rests with the model


def tuned_parameters(model: GPT) -> dict[str, torch.nn.Parameter]:
    """Every parameter that trains, by name: what the optimizer gets, and all that a tuned file holds."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_tuned(model: GPT, tensors: dict[str, Tensor], where: str) -> None:
    """Raises UserError, with every difference, unless a tuned file's names and shapes are exactly those that
    train in a model to which its mode was applied."""
    tuned = tuned_parameters(model)
    expected = {name: parameter.shape for name, parameter in tuned.items()}
    faults = compare_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if faults:
        raise UserError(f"{where} does not fit the model and options it names: {'; '.join(faults)}")


def load_tuned(model: GPT, tensors: dict[str, Tensor], where: str) -> None:
    """A tuned file's tensors into a model to which the same mode was applied. Raises UserError where they do
    not fit."""
    check_tuned(model, tensors, where)
    for name, parameter in tuned_parameters(model).items():
        parallel.fill(parameter, tensors[name])


def merge(model: GPT, mode: str) -> None:
    """Leave GPT-2's own parameters alone to say what the tuned model does, so that it can be saved as a plain
    GPT-2. Raises UserError, with the mode's reason, where that is impossible."""
    with torch.device("meta"):
        base = set(GPT(model.config).state_dict())
    if set(tuned_parameters(model)) <= base:
        return
    if not hasattr(MODES[mode], "merge"):
        raise UserError(f"mode {mode} adds parameters of its own and has no merge")
    MODES[mode].merge(model)


def describe(model: GPT, mode: str) -> list[str]:
    """What the mode can say of its tuned parameters; by default their names, shapes and norms."""
    if hasattr(MODES[mode], "describe"):
        return MODES[mode].describe(model)
    tuned = tuned_parameters(model)
    return [f"{name} {tuple(p.shape)} norm {p.norm().item():.4g}" for name, p in tuned.items()]
