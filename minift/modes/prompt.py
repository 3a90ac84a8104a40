"""Prompt tuning (Lester et al. 2021): the model stays frozen, and the embeddings of P extra tokens in front
train."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.errors import UserError
from minift.model.gpt import GPT
from minift.options import option

peft_type = "PROMPT_TUNING"
TRAINING = {"lr": 3e-2, "weight_decay": 0.0}


@dataclass(frozen=True)
class Options:
    prompt_tokens: int = option(20, "length of the soft prompt; it takes that many of the model's positions")
    prompt_init: str = option("vocab", "where it starts: vocab (embeddings of sampled tokens), text (of "
                                       "--prompt-text), noise (normal, 0.02)", ("vocab", "text", "noise"))
    prompt_text: str | None = option(None, "the text to start from, repeated or cut to --prompt-tokens; "
                                           "needs --prompt-init text")


class SoftPrompt(nn.Module):
    """The learned embeddings, weight (P, C)."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.weight = nn.Parameter(start.detach().float().clone())


def apply(model: GPT, options: Options) -> None:
    """Fill the model's prompt slot. Raises UserError when it would leave no room, or the options
    contradict."""
    count, room = options.prompt_tokens, model.config.n_positions
    if not 1 <= count < room:
        raise UserError(f"--prompt-tokens {count}: must be at least 1 and below the model's {room} positions")
    if (options.prompt_init == "text") != (options.prompt_text is not None):
        raise UserError("--prompt-init text and --prompt-text TEXT go together: give both or neither")
    embeddings = model.wte.weight.detach()
    if options.prompt_init == "noise":
        start = torch.randn(count, model.config.n_embd).to(model.device) * 0.02
    elif options.prompt_init == "text":
        if model.tokenizer is None:
            raise UserError("--prompt-init text needs the model's tokenizer, and there is none")
        ids = model.tokenizer.encode(options.prompt_text, add_special_tokens=False).ids
        if not ids:
            raise UserError("--prompt-text is empty: give at least one token to start from")
        start = embeddings[torch.tensor((ids * count)[:count])]
    else:  # section 3.2: among the 5,000 commonest tokens, with which a BPE vocabulary begins
        common = min(5000, model.config.vocab_size)
        start = embeddings[torch.randperm(common)[torch.arange(count) % common]]
    model.prompt = SoftPrompt(start)
    model.prompt.requires_grad_(True)


@torch.no_grad()
def nearest_tokens(model: GPT, count: int = 3) -> list[list[tuple[str, float]]]:
    """For each learned vector the `count` vocabulary tokens nearest by cosine, with the cosine. A way to look
    at what was learned, not an explanation of it: unlike prompts can do the same work (Lester et al. 2021,
    section 7)."""
    table = F.normalize(model.wte.weight.float(), dim=-1)  # (V, C)
    cosine = F.normalize(model.prompt.weight.float(), dim=-1) @ table.T  # (P, V)
    best = cosine.topk(count)
    near = []
    for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        tokens = [model.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        near.append(list(zip(tokens, values, strict=True)))
    return near


def describe(model: GPT) -> list[str]:
    """A line for each vector: its norm and its nearest tokens."""
    norms = model.prompt.weight.norm(dim=-1).tolist()
    lines = []
    for i, (norm, near) in enumerate(zip(norms, nearest_tokens(model), strict=True)):
        tokens = ", ".join(f"{token!r} {cosine:.2f}" for token, cosine in near)
        lines.append(f"{i:3}  norm {norm:7.3f}  nearest {tokens}")
    return lines


def merge(model: GPT) -> None:
    raise UserError("a soft prompt cannot be merged: it is extra input, and GPT-2's own weights have no "
                    "place for it")
