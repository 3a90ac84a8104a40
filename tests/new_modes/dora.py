"""DoRA (Liu et al. 2024): a weight as its magnitude m times its direction, W' = m V / |V| with V = W + s B A.

m (out,) and LoRA's A and B train. |V| is the norm of each output's row; it counts as a constant in the backward
pass (section 4.3).
"""

import torch
from torch import Tensor, nn

from minift.model.gpt import GPT
from minift.modes import lora
from minift.modes.mode import Mode


class DoRALinear(lora.LoRALinear):
    """LoRALinear with a learned magnitude for each output. The outputs without an update keep theirs."""

    def __init__(self, target: lora.Target, dropout: float):
        super().__init__(target.layer, target.rank, target.scale, dropout, target.offsets, target.part_size)
        self.magnitude = nn.Parameter(self.norm())  # so that it starts at the base exactly
        self.constant_factor: Tensor | None = None

    def norm(self) -> Tensor:
        """|V| of each output, (out,) in fp32."""
        with torch.no_grad():
            return (self.weight.float() + self.update()).norm(dim=1)

    def set_constant(self, constant: bool) -> None:
        """The norm reads all of W: decoding must not compute it for every token."""
        super().set_constant(constant)
        self.constant_factor = (self.magnitude / self.norm()).detach() if constant else None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.constant_factor
        if factor is None:
            factor = self.magnitude / self.norm()  # (out,)
        return self.updated(x, bias=None) * factor.to(x.dtype) + self.bias.to(x.dtype)


def apply(model: GPT, options: lora.Options) -> None:
    """Replace the target layers by DoRALinear. Raises UserError for unknown targets."""
    for target in lora.target_layers(model, options):
        lora.replace_layer(model, target, DoRALinear(target, options.dropout))


@torch.no_grad()
def merge(model: GPT) -> None:
    """Multiply magnitude and direction out, in fp32. The updates are zero afterwards."""
    for layer in lora.lora_layers(model).values():
        factor = layer.magnitude / layer.norm()
        layer.weight.data = (factor[:, None] * (layer.weight.float() + layer.update())).to(layer.weight.dtype)
        layer.lora_B.zero_()
        layer.magnitude.copy_(layer.norm())


MODE = Mode("dora", lora.Options, apply, lr=1e-3, embedded_lr=7e-3, merge=merge, uses_kernel=True)
