"""Bottleneck adapters: a small MLP on a sublayer's output, added to it; the model itself stays frozen.

Houlsby et al. 2019 put one after attention and one after the MLP, and let the LayerNorms train too
(`--adapter-norms`); Pfeiffer et al. 2021 keep the one after the MLP.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.errors import UserError
from minift.model.gpt import GPT, Linear
from minift.options import option

peft_type = None
TRAINING = {"lr": 1e-3, "weight_decay": 0.0}


@dataclass(frozen=True)
class Options:
    bottleneck: int = option(64, "width of an adapter's middle")
    placement: str = option("houlsby", "houlsby: two adapters a block; pfeiffer: one, after the MLP",
                            ("houlsby", "pfeiffer"))
    adapter_norms: bool = option(False, "let every LayerNorm train too, as Houlsby et al. do")


class Adapter(nn.Module):
    """x + up(gelu(down(x))), (..., C) -> (..., C). `up` starts at zero, so the adapter starts as the
    identity."""

    def __init__(self, n_embd: int, bottleneck: int, device: torch.device):
        super().__init__()
        self.down = Linear(n_embd, bottleneck, device=device)
        self.up = Linear(bottleneck, n_embd, device=device)
        nn.init.normal_(self.down.weight, std=0.01)  # Houlsby et al. 2019, section 3.6: near-zero starts work
        for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start_at_zero)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def apply(model: GPT, options: Options) -> None:
    """Fill the blocks' adapter slots. Raises UserError for a bottleneck below 1."""
    if options.bottleneck < 1:
        raise UserError(f"--bottleneck {options.bottleneck}: must be at least 1")
    for block in model.h:
        slots = ("attn_adapter", "mlp_adapter") if options.placement == "houlsby" else ("mlp_adapter",)
        for slot in slots:
            adapter = Adapter(model.config.n_embd, options.bottleneck, model.device)
            setattr(block, slot, adapter.requires_grad_(True))
    if options.adapter_norms:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)


def merge(model: GPT) -> None:
    raise UserError("adapters cannot be merged: their GELU makes them non-linear, and GPT-2 has no such "
                    "layer")
