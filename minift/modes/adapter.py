"""Bottleneck adapters: a small MLP on a sublayer's output, added to it. The base stays frozen.

Houlsby et al. 2019 put one after attention and one after the MLP, and also train the LayerNorms
(`--adapter-norms`); Pfeiffer et al. 2021 keep only the one after the MLP.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.model.gpt import GPT, Linear
from minift.modes.mode import Mode
from minift.options import option


@dataclass(frozen=True)
class Options:
    bottleneck: int = option(64, "width of an adapter's hidden layer", least=1)
    placement: str = option("houlsby", "houlsby: two adapters a block; pfeiffer: one, after the MLP",
                            choices=("houlsby", "pfeiffer"))
    adapter_norms: bool = option(False, "train every LayerNorm too, as Houlsby et al. do")


class Adapter(nn.Module):
    """x + up(gelu(down(x))), (..., C) -> (..., C)."""

    def __init__(self, n_embd: int, bottleneck: int, device: torch.device):
        super().__init__()
        self.down = Linear(n_embd, bottleneck, device=device)
        self.up = Linear(bottleneck, n_embd, device=device)
        nn.init.normal_(self.down.weight, std=0.01)  # Houlsby et al. 2019, section 3.6: near-zero works
        nn.init.zeros_(self.down.bias)
        # exactly zero, so that the adapter starts as the identity and the first loss is the base's
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.down(x))  # (..., C) -> (..., bottleneck)
        return x + self.up(hidden)  # (..., bottleneck) -> (..., C)


def apply(model: GPT, options: Options) -> None:
    """Fill the blocks' adapter slots."""
    for block in model.h:
        if options.placement == "houlsby":
            block.attn_adapter = Adapter(model.config.n_embd, options.bottleneck, model.device)
        block.mlp_adapter = Adapter(model.config.n_embd, options.bottleneck, model.device)
    if options.adapter_norms:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)


MODE = Mode("adapter", Options, apply, lr=3e-3, embedded_lr=1e-2,
            why_no_merge="adapters cannot be merged: their GELU is not linear, and GPT-2 has no such layer")
