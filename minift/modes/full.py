"""Full tuning: every parameter of the base trains. The yardstick for the other modes."""

from dataclasses import dataclass

from minift.model.gpt import GPT

peft_type = None
TRAINING = {"lr": 1e-4, "weight_decay": 0.01}


@dataclass(frozen=True)
class Options:
    """Full tuning has nothing to choose."""


def apply(model: GPT, options: Options) -> None:
    model.requires_grad_(True)
