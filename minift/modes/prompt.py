"""Prompt tuning (Lester et al. 2021): P learned embeddings in front of every row train, the base stays frozen."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from minift.errors import UserError
from minift.model.gpt import GPT
from minift.modes.mode import Mode
from minift.options import option

COMMON_TOKENS = 5000  # Lester et al. 2021, section 3.2; a BPE vocabulary begins with the most common tokens


@dataclass(frozen=True)
class Options:
    prompt_tokens: int = option(20, "length of the soft prompt; it takes that many of the model's positions",
                                least=1)
    prompt_init: str = option("vocab", "initial values: vocab (embeddings of sampled tokens), text (of "
                                       "--prompt-text), noise (normal, 0.02)",
                              choices=("vocab", "text", "noise"))
    prompt_text: str | None = option(None, "the text for --prompt-init text, repeated or cut to "
                                           "--prompt-tokens")


class SoftPrompt(nn.Module):
    """The learned embeddings, weight (P, C)."""

    def __init__(self, initial: Tensor):
        super().__init__()
        self.weight = nn.Parameter(initial.detach().float().clone())
        self.weight.no_decay = True  # it is a matrix, and matrices decay by default


def apply(model: GPT, options: Options) -> None:
    """Fill the model's prompt slot. Raises UserError for a prompt that takes all positions, or options that contradict
    each other."""
    P, n_positions = options.prompt_tokens, model.config.n_positions
    if P >= n_positions:
        raise UserError(f"--prompt-tokens {P}: must be below the model's {n_positions} positions")
    if (options.prompt_init == "text") != (options.prompt_text is not None):
        raise UserError("--prompt-init text and --prompt-text TEXT belong together: give both or neither")
    if options.prompt_init == "vocab":
        common = min(COMMON_TOKENS, model.config.vocab_size)
        sampled = torch.randperm(common)[torch.arange(P) % common]  # (P,); repeated if P is larger
        initial = model.wte.weight[sampled]
    else:  # noise; text replaces these values in start_from_text, as `apply` has no tokenizer
        initial = torch.randn(P, model.config.n_embd).to(model.device) * 0.02
    model.prompt, model.prompt_tokens = SoftPrompt(initial), P


@torch.no_grad()
def start_from_text(model: GPT, options: Options, tokenizer: Tokenizer) -> None:
    """With --prompt-init text: the embeddings of the text's tokens. Raises UserError for an empty text."""
    if options.prompt_init != "text":
        return
    ids = tokenizer.encode(options.prompt_text, add_special_tokens=False).ids
    if not ids:
        raise UserError("--prompt-text is empty: give at least one token to start from")
    P = model.prompt_tokens
    repeated = (ids * P)[:P]  # exactly P tokens, from a shorter or a longer text
    model.prompt.weight.copy_(model.wte.weight[torch.tensor(repeated)])


@torch.no_grad()
def nearest_tokens(model: GPT, tokenizer: Tokenizer, count: int = 3) -> list[list[tuple[str, float]]]:
    """For each learned vector, the `count` tokens whose embeddings have the largest cosine with it, and the cosines.
    This shows the vectors but explains little: different prompts can do the same work (Lester et al. 2021, section
    7)."""
    vocabulary = F.normalize(model.wte.weight.float(), dim=-1)  # (V, C)
    cosine = F.normalize(model.prompt.weight.float(), dim=-1) @ vocabulary.T  # (P, V)
    best = cosine.topk(count)  # (P, count)
    nearest = []
    for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        nearest.append(list(zip(tokens, values, strict=True)))
    return nearest


def describe(model: GPT, tokenizer: Tokenizer) -> list[str]:
    """One line for each vector: its norm and its nearest tokens."""
    norms = model.prompt.weight.norm(dim=-1).tolist()
    lines = []
    for i, nearest in enumerate(nearest_tokens(model, tokenizer)):
        tokens = ", ".join(f"{token!r} {cosine:.2f}" for token, cosine in nearest)
        lines.append(f"{i:3}  norm {norms[i]:7.3f}  nearest {tokens}")
    return lines


MODE = Mode("prompt", Options, apply, lr=1e-1, embedded_lr=1e-1, start=start_from_text, describe=describe,
            peft_type="PROMPT_TUNING",
            why_no_merge="a soft prompt cannot be merged: it is extra input, and GPT-2's own weights have no "
                         "place for it")
