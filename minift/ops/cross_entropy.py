"""The loss at the vocabulary, without a tensor of all logits: forward and backward in one pass, in chunks of
tokens."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at one time
WORDS = 8192  # words whose probabilities exist in fp32 at one time


class HeadLoss(torch.autograd.Function):
    """The sum of -log softmax(h W^T)[target]. A chunk's logits are made once, turned into exp(logit - max) in
    place, and used up before the next chunk's: nothing of them is kept for the backward pass. With e those
    exponentials and t their sum, the gradient of a token's logits is e / t, less 1 at the target. Division
    and target are left to tensors of (n, C), in fp32: in bf16, e / t - 1 of a well-known word would be mostly
    rounding.

    The logits are (V, n): on a CPU in bf16 the larger matrix is better the left one (6 ms instead of 16 for
    192 tokens on two cores with AMX).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), device=hidden.device, dtype=wide)
        dhidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        room = torch.empty_like if len(targets) else torch.zeros_like  # the first chunk fills it
        dweight = room(weight) if ctx.needs_input_grad[1] else None
        head = [words.to(hidden.dtype) for words in weight.split(WORDS)]
        for start in range(0, len(targets), CHUNK):
            target, h = targets[start : start + CHUNK], hidden[start : start + CHUNK]
            n = len(target)  # the tokens after these are padding
            places = target, torch.arange(n, device=target.device)
            logits = h.new_empty(len(weight), len(h))  # (V, chunk)
            parts = logits.split(WORDS)
            for words, part in zip(head, parts, strict=True):
                torch.mm(words, h.T, out=part)
            highest, total = logits.amax(0).to(wide), torch.zeros(len(h), device=h.device, dtype=wide)
            at_target = logits[places].to(wide) - highest[:n]
            for part in parts:
                exponentials = part.to(wide).sub_(highest).exp_()
                total += exponentials.sum(0)
                part.copy_(exponentials)
            loss += (total[:n].log() - at_target).sum()
            logits[places] = 0
            share = 1 / total[:, None]  # (chunk, 1)
            share[n:] = 0
            learned = at_target.exp()[:, None] * share[:n] - 1  # (n, 1)
            if dhidden is not None:
                dh = torch.zeros(h.shape, device=h.device, dtype=wide)
                for words, part in zip(head, parts, strict=True):
                    dh += part.T @ words
                dh *= share
                dh[:n] += learned * weight[target]
                dhidden[start : start + CHUNK] = dh
            if dweight is not None:
                scaled = (h * share).to(h.dtype)
                for dwords, part in zip(dweight.split(WORDS), parts, strict=True):
                    if start:
                        dwords += part @ scaled
                    else:
                        dwords.copy_(part @ scaled)
                dweight.index_add_(0, target, (learned * h[:n]).to(weight.dtype))
        ctx.gradients = dhidden, dweight
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # nobody else's, so autograd may add to them in place
        return *(None if grad is None else grad.mul_(dloss) for grad in gradients), None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (n or more, C), the head's weight (V, C), targets (n,) -> the summed cross-entropy of the first
    n rows in nats, fp32, shape (). The rows beyond are padding, with a gradient of 0."""
    if not torch.is_grad_enabled():  # a Function sees requires_grad, and would make gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return HeadLoss.apply(hidden, weight, targets)
