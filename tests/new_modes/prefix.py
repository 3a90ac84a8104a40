"""Prefix tuning (Li and Liang 2021): learned keys and values in front of every row, in each block's attention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.errors import UserError
from minift.model.gpt import GPT
from minift.modes.mode import Mode
from minift.options import option


@dataclass(frozen=True)
class Options:
    prefix_length: int = option(10, "keys and values in front of each row; they take as many positions", least=1)


class Prefix(nn.Module):
    """One block's keys and values, weight (P, 2C)."""

    def __init__(self, initial: Tensor):
        super().__init__()
        self.weight = nn.Parameter(initial)
        self.weight.no_decay = True


def apply(model: GPT, options: Options) -> None:
    """Fill every block's prefix slot. Raises UserError when the prefix would leave no room for a row."""
    P, config = options.prefix_length, model.config
    if P >= config.n_positions:
        raise UserError(f"--prefix-length {P}: must be below the model's {config.n_positions} positions")
    model.prompt_tokens = P
    for block in model.h:
        initial = 0.02 * torch.randn(P, 2 * config.n_embd)  # drawn on the CPU: the same on every device
        block.attn.prefix = Prefix(initial.to(model.device))


MODE = Mode("prefix", Options, apply, lr=3e-3, embedded_lr=3e-2,
            why_no_merge="a prefix cannot be merged: GPT-2 has no place for keys and values without a token")
