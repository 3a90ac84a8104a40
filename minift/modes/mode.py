"""The record that describes a tuning mode to the rest of the program. minift/modes/__init__.py explains it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from minift.model.gpt import GPT


@dataclass(frozen=True)
class Mode:
    """One tuning mode. The first five fields are required, the others say what else the mode can do."""

    name: str
    Options: type  # a frozen dataclass; its fields become command-line flags
    apply: Callable[[GPT, Any], None]
    lr: float  # default peak learning rate, and for the embedded base below
    embedded_lr: float
    weight_decay: float = 0.0
    # initial values that depend on the tokenizer, for a new run: start(model, options, tokenizer)
    start: Callable[[GPT, Any, Tokenizer], None] | None = None
    # fold what the mode added into GPT-2's own weights
    merge: Callable[[GPT], None] | None = None
    why_no_merge: str = ""  # the reason to show, for a mode that adds parameters and has no merge
    # lines about the learned parameters: describe(model, tokenizer)
    describe: Callable[[GPT, Tokenizer], list[str]] | None = None
    peft_type: str | None = None  # PEFT's name of the method, if minift/files/peft.py can convert it
    uses_kernel: bool = False  # whether --kernel chooses how the mode computes
