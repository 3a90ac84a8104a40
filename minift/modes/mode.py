"""The record that describes a tuning mode to the rest of the program. minift/modes/__init__.py explains it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from minift.model.gpt import GPT


@dataclass(frozen=True)
class Mode:
    """One tuning mode. The fields without a default are required; the others are what else the mode can do."""

    name: str
    Options: type  # a frozen dataclass; its fields become command-line flags
    apply: Callable[[GPT, Any], None]  # apply(model, options)
    lr: float  # default peak learning rate; minift/modes/README.md says how it was found
    embedded_lr: float  # the same for the embedded base
    weight_decay: float = 0.0  # default weight decay
    # give a new run initial values that depend on the tokenizer: start(model, options, tokenizer)
    start: Callable[[GPT, Any, Tokenizer], None] | None = None
    # add the effect of the mode's parameters to GPT-2's own weights
    merge: Callable[[GPT], None] | None = None
    why_no_merge: str = ""  # the reason in the error message, for a mode that adds parameters and has no merge
    # text lines about the learned parameters: describe(model, tokenizer)
    describe: Callable[[GPT, Tokenizer], list[str]] | None = None
    peft_type: str | None = None  # PEFT's name of the method, if minift/files/peft.py can convert it
    uses_kernel: bool = False  # whether --kernel has a meaning for the mode
