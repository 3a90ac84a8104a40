"""The loss at the vocabulary, without a tensor of all logits: forward and backward in one pass, in chunks of
tokens."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # tokens whose logits exist at one time


class HeadLoss(torch.autograd.Function):
    """The sum of -log softmax(h W^T)[target]. A chunk's logits are made once, turned into their own gradient
    in place (softmax minus one-hot), and used up before the next chunk's: neither is kept for the backward
    pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK):
            h, target = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            real = len(target)  # the rows after these are padding
            logits = h @ head.T  # (chunk, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits -= logits.amax(-1, keepdim=True)
            loss -= logits[:real].gather(1, target).sum()
            total = logits.exp_().sum(-1, keepdim=True)  # in place: logsumexp would make another (chunk, V)
            loss += total[:real].log().sum()
            if dhidden is None and dweight is None:
                continue
            dlogits = logits.div_(total)
            dlogits[:real].scatter_add_(1, target, torch.full_like(total[:real], -1.0))
            dlogits[real:] = 0
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, head, out=dhidden[start : start + CHUNK])
            if dweight is not None:
                dweight += dlogits.T @ h
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if grad is None else grad.mul_(dloss) for grad in ctx.saved_tensors), None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (n or more, C), the head's weight (V, C), targets (n,) -> the summed cross-entropy of the first
    n rows in nats, fp32, shape (). The rows beyond are padding, with a gradient of 0."""
    if not torch.is_grad_enabled():  # a Function sees requires_grad, and would make gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return HeadLoss.apply(hidden, weight, targets)
