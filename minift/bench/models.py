"""Models with random weights, for benchmarks."""

import torch

from minift.files.hub import PRESETS
from minift.model.gpt import GPT, GPTConfig

SIZES = {name: preset.config for name, preset in PRESETS.items()}
# for tests and dry runs
SIZES["tiny"] = GPTConfig(vocab_size=97, n_positions=96, n_embd=32, n_layer=2, n_head=2, eos_token_id=96)


def random_model(size: str, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model of SIZES with random weights, frozen."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # create the weights in the compute dtype: a large model never exists in fp32
    with torch.device(device):
        model = GPT(SIZES[size])
    torch.set_default_dtype(torch.float32)
    if device.type == "cuda":  # a CPU draws the weights of GPT-2 XL for 10 seconds and more
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.zeros_(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.ones_(module.weight)
    else:
        model.init_weights(0)
    return model.requires_grad_(False)
