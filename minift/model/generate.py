"""Generation, greedy or sampled, with a key-value cache, for prompts of different lengths at once."""

import torch
from torch import Tensor

from minift.errors import UserError
from minift.model.cache import KVCache
from minift.model.gpt import GPT
from minift.model.packing import Batch, Row


def next_tokens(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
                generator: torch.Generator) -> Tensor:
    """Choose the next token of each row: logits (B, V) -> (B,).

    temperature: 0 is greedy.
    top_k: sample from the k most likely tokens, and those with the same probability as the k-th.
    top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least top_p (nucleus
    sampling, Holtzman et al. 2020).
    """
    if temperature < 1e-6:  # a division by less could overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1): the k-th largest
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        sum_before = probs.cumsum(-1) - probs  # of the more likely tokens; 0 for the first, which always stays
        excluded = sum_before >= top_p
        excluded = excluded.scatter(-1, order, excluded)  # back into the order of the vocabulary
        logits = logits.masked_fill(excluded, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0,
             stop: int | None = None) -> list[list[int]]:
    """Continue each prompt (token ids, of any lengths) by at most `max_new_tokens` tokens. Returns the new ids.

    stop: the token that ends a row; it is not returned. None: every row gets all its new tokens.

    Raises UserError for an empty prompt, sampling settings out of range, or a row beyond the model's
    positions.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise UserError("an empty prompt: generation needs at least one token to start from")
    if not temperature >= 0 or not (top_k is None or top_k >= 1) or not (top_p is None or 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature must be 0 or "
                        "more, top_k 1 or more, top_p above 0 and at most 1")
    P = model.prompt_tokens
    longest = max(len(prompt) for prompt in prompts)
    config, device = model.config, model.device
    if P + longest + max_new_tokens > config.n_positions:
        reserved = f"{P} reserved positions + " if P else ""
        raise UserError(f"{reserved}{longest} prompt tokens + {max_new_tokens} new ones exceed the model's "
                        f"{config.n_positions} positions: shorten the prompt or lower --max-new-tokens")
    was_training = model.training
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    new = [[] for _ in prompts]  # the new ids of each row
    running = [True] * len(prompts)  # a row that has ended stays in the batch, and its tokens are ignored
    with model.constant_parameters():
        batch, last = pack_prompts(model, prompts)
        cache = KVCache(config.n_layer, config.n_head, config.n_embd // config.n_head, batch.rows.seqlens,
                        max_new_tokens, model.compute_dtype, device)
        hidden = model.hidden(batch, last, cache)  # (B, C)
        for step in range(max_new_tokens):
            tokens = next_tokens(model.logits(hidden), temperature, top_k, top_p, generator)
            for row, token in enumerate(tokens.tolist()):
                running[row] = running[row] and token != stop
                if running[row]:
                    new[row].append(token)
            if not any(running) or step == max_new_tokens - 1:  # the last token needs no further pass
                break
            hidden = model.next_hidden(tokens, cache)
    model.train(was_training)
    return new


def pack_prompts(model: GPT, prompts: list[list[int]]) -> tuple[Batch, Tensor]:
    """Prompts as a batch without targets, and the indices (B,) of their last tokens in the N tokens."""
    # pack leaves out the last token of a row, which in training is a target only: give it one more
    batch = model.pack([Row([*prompt, 0], ()) for prompt in prompts])
    return batch, batch.rows.cu_seqlens[1:-1].long() - 1
