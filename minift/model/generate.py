"""Text out of a model: greedy or sampled, with a key-value cache, for prompts of different lengths at
once."""

import torch
from torch import Tensor

from minift.errors import UserError
from minift.model.cache import KVCache
from minift.model.gpt import GPT


def next_tokens(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
                generator: torch.Generator) -> Tensor:
    """(B, V) logits -> (B,) tokens. Temperature 0 is greedy; top_k keeps the k likeliest tokens, and those
    as likely as the k-th; top_p the fewest likeliest that together hold at least that probability (Holtzman
    et al. 2020)."""
    if temperature < 1e-6:  # logits divided by less could overflow, and the argmax is all they would give
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= top_p  # the probability before this token is enough already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0,
             stop: int | None = None) -> list[list[int]]:
    """Continue each prompt (token ids) by at most `max_new_tokens` tokens; gives the new ids alone, `stop`
    left out.

    Prompts may differ in length. `stop` is the token that ends a row (GPT-2: config.eos_token_id); None never
    stops. Raises UserError for an empty prompt, sampling settings out of range, or a row beyond the model's
    positions.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise UserError("an empty prompt: generation needs at least one token to start from")
    if not temperature >= 0 or not (top_k is None or top_k >= 1) or not (top_p is None or 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature must be 0 or "
                        "more, top_k 1 or more, top_p above 0 and at most 1")
    P, longest = model.prompt_tokens, max(map(len, prompts))
    if P + longest + max_new_tokens > model.config.n_positions:
        soft = f"{P} of the soft prompt + " if P else ""
        raise UserError(f"{soft}{longest} prompt tokens + {max_new_tokens} new ones pass the model's "
                        f"{model.config.n_positions} positions: shorten the prompt or lower --max-new-tokens")
    was_training, device = model.training, model.device
    model.eval()
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    lengths = [len(prompt) for prompt in prompts]
    config = model.config
    cache = KVCache(config.n_layer, config.n_head, config.n_embd // config.n_head, [P + n for n in lengths],
                    max_new_tokens, model.compute_dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor([row * longest + n - 1 for row, n in enumerate(lengths)], device=device)
    last = model.hidden(ids.to(device), lengths, ends, cache)  # (B, C)
    new, running = [[] for _ in prompts], [True] * len(prompts)
    for step in range(max_new_tokens):
        tokens = next_tokens(model.logits(last), temperature, top_k, top_p, generator)
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token != stop
            if running[row]:
                new[row].append(token)
        if not any(running) or step == max_new_tokens - 1:
            break
        last = model.next_hidden(tokens, cache)
    model.train(was_training)
    return new
