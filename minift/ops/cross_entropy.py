"""The loss: the cross-entropy of the language-model head, summed over the targets, in nats.

With GPT-2's vocabulary the logits are a large tensor. The fast version never holds all of them: it computes those of
one block of tokens, and uses them for the loss and for both gradients, before it computes the next. On a CPU the blocks
are small, since their numbers should stay in its caches. On a GPU they are large, and take few kernels.

Letters in shape comments: n targets, C = n_embd, V vocabulary, m tokens of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor

from minift import ops
from minift.ops.linear import matmul_to

TOKEN_BLOCK = 256  # tokens whose logits exist at one time
VOCAB_BLOCK = 8192  # words of the vocabulary whose probabilities exist in fp32 at one time
GPU_TOKEN_BLOCK = 2048  # the same on a GPU: two tensors of 0.4 GB, in fp32, with GPT-2's vocabulary
PADDING = -100  # a target that does not count; torch's own cross-entropy ignores it too


def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (n or more, C), weight (V, C), targets (n,) -> (): the sum of -log p(target). Rows of `hidden`
    after the first n are padding. An objective that needs all logits starts from here."""
    logits = hidden[: len(targets)] @ weight.to(hidden.dtype).T  # (n, C) @ (C, V) -> (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.log_softmax(-1)  # (n, V)
    target_log_probs = log_probs.gather(1, targets[:, None])  # (n, 1)
    return -target_log_probs.sum()


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, has_padding: bool = False) -> Tensor:
    """hidden (n or more, C), weight (V, C), targets (n,) -> (): the sum of -log p(target) in nats, fp32 (fp64
    for fp64). Rows of `hidden` after the first n are padding, and their gradient is 0. has_padding: so are the targets
    that are PADDING, in a CUDA graph, where n is fixed."""
    if has_padding:
        is_padding = targets == PADDING
        # where the hidden state is 0, every word has -log p = log V, and the gradient of the weight is 0
        hidden = hidden[: len(targets)].masked_fill(is_padding[:, None], 0)
        loss = cross_entropy(hidden, weight, targets.masked_fill(is_padding, 0))
        return loss - is_padding.sum() * math.log(len(weight))
    if ops.plain:
        return cross_entropy_reference(hidden, weight, targets)
    if not torch.is_grad_enabled():
        # needs_input_grad is True for a trained weight under no_grad too: its gradient would be computed for nothing
        hidden, weight = hidden.detach(), weight.detach()
    return FusedCrossEntropy.apply(hidden, weight, targets)


class FusedCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradients too, for dloss = 1, while the logits exist. The backward pass multiplies
    them by the real dloss. Keeps the two gradients, and its inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        loss, *ctx.gradients = loss_and_gradients(hidden, weight, targets, *ctx.needs_input_grad[:2])
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd may add to the tensors that it gets, in place. A copy of dweight (V, C) would be expensive, so they
        # are not kept, and a second backward pass through the same graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, weight, targets = ctx.saved_tensors
            _, *gradients = loss_and_gradients(hidden, weight, targets, *ctx.needs_input_grad[:2])
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(dloss)
        dhidden, dweight = gradients
        return dhidden, dweight, None


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, need_dhidden: bool, need_dweight: bool
                       ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, dhidden (like hidden) and dweight (V, C); None for a gradient that is not needed."""
    compute = small_blocks if hidden.device.type == "cpu" else large_blocks
    return compute(hidden, weight, targets, need_dhidden, need_dweight)


def large_blocks(hidden: Tensor, weight: Tensor, targets: Tensor, need_dhidden: bool, need_dweight: bool
                 ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`loss_and_gradients` for a GPU. The logits are in fp32; dlogits = softmax(logits), minus 1 at the target, are
    rounded to the dtype of `hidden` after the subtraction, so that those of a target with p near 1 are not 0."""
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), device=hidden.device, dtype=acc_dtype)
    dhidden = torch.zeros_like(hidden) if need_dhidden else None
    dweight = torch.zeros_like(weight) if need_dweight and len(targets) == 0 else None
    cast_weight = weight.to(hidden.dtype)
    for start in range(0, len(targets), GPU_TOKEN_BLOCK):
        target = targets[start : start + GPU_TOKEN_BLOCK, None]  # (m, 1)
        h = hidden[start : start + len(target)]  # (m, C)
        log_probs = matmul_to(h, cast_weight.T, acc_dtype).log_softmax(1)  # (m, C) @ (C, V) -> (m, V)
        target_log_probs = log_probs.gather(1, target)  # (m, 1)
        loss -= target_log_probs.sum()
        if not (need_dhidden or need_dweight):
            continue
        dlogits = torch.exp(log_probs, out=torch.empty_like(log_probs, dtype=h.dtype))  # (m, V)
        dlogits.scatter_(1, target, target_log_probs.expm1().to(h.dtype))  # p(target) - 1
        if need_dhidden:
            torch.mm(dlogits, cast_weight, out=dhidden[start : start + len(target)])  # (m, V) @ (V, C) -> (m, C)
        if need_dweight:
            product = matmul_to(dlogits.T, h, weight.dtype)  # (V, m) @ (m, C) -> (V, C)
            dweight = product if dweight is None else dweight.add_(product)
    return loss, dhidden, dweight


def small_blocks(hidden: Tensor, weight: Tensor, targets: Tensor, need_dhidden: bool, need_dweight: bool
                 ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`loss_and_gradients` for a CPU.

    dlogits = softmax(logits), minus 1 at the target, and softmax = exp / sum_exp. exp (V, m) is stored in the dtype of
    `hidden`. The division and the -1 are applied later, to tensors of (m, C) in fp32: they are smaller, and in bf16
    p - 1 would round to 0 for a target with p near 1. So exp is 0 at the targets, and target_grad adds their part.
    """
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), device=hidden.device, dtype=acc_dtype)
    dhidden = torch.zeros_like(hidden) if need_dhidden else None
    # the first block of tokens overwrites dweight; without targets there is no block, and it must be 0
    alloc = torch.empty_like if len(targets) else torch.zeros_like
    dweight = alloc(weight) if need_dweight else None
    weight_blocks = [block.to(hidden.dtype) for block in weight.split(VOCAB_BLOCK)]

    for start in range(0, len(targets), TOKEN_BLOCK):
        target = targets[start : start + TOKEN_BLOCK]  # (n,) of this block
        h = hidden[start : start + TOKEN_BLOCK]  # (m, C); the tokens after the first n are padding
        n = len(target)
        exp_blocks, target_logit, sum_exp = exponentials(h, weight_blocks, target)
        loss += (sum_exp[:n].log() - target_logit).sum()
        inv_sum_exp = 1 / sum_exp[:, None]  # (m, 1)
        inv_sum_exp[n:] = 0  # padding has no gradient
        target_grad = target_logit.exp()[:, None] * inv_sum_exp[:n] - 1  # (n, 1): p(target) - 1

        if dhidden is not None:
            dh = torch.zeros(h.shape, device=h.device, dtype=acc_dtype)
            for weight_block, exp_block in zip(weight_blocks, exp_blocks, strict=True):
                dh += exp_block.T @ weight_block  # (m, words) @ (words, C) -> (m, C)
            dh *= inv_sum_exp
            dh[:n] += target_grad * weight[target]
            dhidden[start : start + TOKEN_BLOCK] = dh
        if dweight is not None:
            scaled_h = (h * inv_sum_exp).to(h.dtype)
            for dweight_block, exp_block in zip(dweight.split(VOCAB_BLOCK), exp_blocks, strict=True):
                product = exp_block @ scaled_h  # (words, m) @ (m, C) -> (words, C)
                if start == 0:  # cheaper than zeros and an addition
                    dweight_block.copy_(product)
                else:
                    dweight_block += product
            dweight.index_add_(0, target, (target_grad * h[:n]).to(weight.dtype))  # a target may be there twice
    return loss, dhidden, dweight


def exponentials(h: Tensor, weight_blocks: list[Tensor], target: Tensor
                 ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """For h (m, C) and target (n,): exp(logit - max_logit) in blocks of (words, m), with 0 at the targets; the
    targets' logit - max_logit (n,); and sum_exp (m,), which includes the targets. max_logit, the largest of a token,
    keeps exp from overflowing."""
    m, n = len(h), len(target)
    V = sum(len(block) for block in weight_blocks)
    acc_dtype = torch.promote_types(h.dtype, torch.float32)
    # (V, m), not (m, V): on a CPU in bf16 the product is faster with the larger matrix on the left (6 ms
    # instead of 16 ms for 192 tokens on two cores with AMX).
    logits = h.new_empty(V, m)
    blocks = logits.split(VOCAB_BLOCK)
    for weight_block, block in zip(weight_blocks, blocks, strict=True):
        torch.mm(weight_block, h.T, out=block)  # (words, C) @ (C, m) -> (words, m)
    at_target = (target, torch.arange(n, device=target.device))
    max_logit = logits.amax(0).to(acc_dtype)  # (m,)
    target_logit = logits[at_target].to(acc_dtype) - max_logit[:n]

    sum_exp = torch.zeros(m, device=h.device, dtype=acc_dtype)
    for block in blocks:
        exp = block.to(acc_dtype).sub_(max_logit).exp_()
        sum_exp += exp.sum(0)
        block.copy_(exp)  # overwrites the logits
    logits[at_target] = 0
    return blocks, target_logit, sum_exp
