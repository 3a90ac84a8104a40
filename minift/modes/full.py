"""Full tuning: every parameter of the base trains. The other modes are measured against it."""

from dataclasses import dataclass

from minift.model.gpt import GPT
from minift.modes.mode import Mode


@dataclass(frozen=True)
class Options:
    """Full tuning has no options."""


def apply(model: GPT, options: Options) -> None:
    """Unfreeze everything."""
    model.requires_grad_(True)


MODE = Mode("full", Options, apply, lr=1e-3, embedded_lr=1e-3, weight_decay=0.01)
