"""Training steps with transformers and PEFT, as most people write them, for `python -m minift.bench peer`.

It runs in a process of its own, on the batches of a JSON file, and prints one JSON object: the seconds and the loss of
each step, and the peak memory. Rows are padded to the longest of the batch, prompts and padding have the label -100,
bf16 is autocast, gradients are clipped at 1. Losses are read at the end, so on a GPU no step waits for one.
"""

import argparse
import json
from functools import partial

import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from minift.bench.models import SIZES
from minift.bench.timing import time_each
from minift.device import peak_memory

IGNORED = -100  # transformers computes no loss for this label
SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


def tuned_model(options: argparse.Namespace) -> nn.Module:
    """The base in a mode, with the options that bench peer gives to train.py."""
    dropout = {}
    if options.model_dropout is not None:
        dropout = {f"{kind}_pdrop": options.model_dropout for kind in ("resid", "embd", "attn")}
    if options.size:
        shape = {name: getattr(SIZES[options.size], name) for name in SHAPE}
        model = GPT2LMHeadModel(GPT2Config(**shape, **dropout))
    else:
        model = GPT2LMHeadModel.from_pretrained(options.model, dtype=torch.float32, **dropout)
    if options.mode == "lora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True,
                            task_type=TaskType.CAUSAL_LM)
        return get_peft_model(model, config)
    if options.mode == "prompt":
        return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=20, task_type=TaskType.CAUSAL_LM))
    if options.mode == "selective":
        model.requires_grad_(False)
        model.transformer.h[-2:].requires_grad_(True)
        model.transformer.ln_f.requires_grad_(True)
    return model


def collate(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Rows as padded tensors (rows, longest): input_ids, attention_mask, labels."""
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row["ids"])
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        for begin, end in row["spans"]:
            labels[i, begin:end] = tokens[begin:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--size", help="instead of --model: random weights of this size")
    parser.add_argument("--batches", required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model-dropout", type=float)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-cudnn", action="store_true", help="attention without cuDNN")
    options = parser.parse_args()
    with open(options.batches, encoding="utf-8") as file:
        batches = json.load(file)

    torch.manual_seed(0)
    device = torch.device(options.device)
    if options.no_cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    model = tuned_model(options).to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    forward = torch.compile(model, dynamic=True) if options.compile else model
    losses = []

    def step(rows: list[dict]) -> None:
        batch = {name: tensor.to(device) for name, tensor in collate(rows, pad=rows[0]["ids"][-1]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            loss = forward(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    seconds = time_each([partial(step, rows) for rows in batches], device)
    print(json.dumps({"seconds": seconds, "losses": [loss.item() for loss in losses],
                      "peak_memory_bytes": peak_memory(device)}))


if __name__ == "__main__":
    main()
