"""Dropout with a mask that depends on a seed alone. It is not stored: the backward pass draws it again, and every
device and every tile of a Triton kernel draws the same bits.

The fast version is `drop`. Functions with a backward pass of their own, in lora.py and attention.py, call it on
their input, and again on its gradient.

Letters in shape comments: M rows, K columns, W = ceil(K / 4) words of a row.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minift.ops import register_op
from minift.ops.kernel_choice import why_no_triton


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return (word + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)
MIX_1 = signed(0xBF58476D1CE4E5B9)
MIX_2 = signed(0x94D049BB133111EB)


def dropout_reference(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    """x (M, K) -> (M, K): x / (1 - rate), or 0 with probability `rate`, in steps of 1/65,536.

    seed: 0-dim int64, on x's device.
    """
    (M, K), W = x.shape, math.ceil(x.shape[1] / 4)
    # Four elements share a word of 64 bits: the product of a random number of the row and one of the column.
    column_numbers, row_numbers = splitmix64(W + M, seed).split([W, M])
    words = row_numbers[:, None] * column_numbers  # (M, W)
    # Without this step the low bits of two rows would be related wherever their numbers end alike.
    words = (words ^ words >> 32) * MIX_1
    bits = words.view(torch.int16)[:, :K]  # (M, W) -> (M, 4 W) -> (M, K)
    return torch.where(bits > drop_threshold(rate), x, 0) / (1 - rate)


def drop_threshold(rate: float) -> int:
    """An element is dropped if its 16 random bits, as a signed integer, are at most this."""
    return min(max(round(rate * 65536), 1), 65535) - 32769


def splitmix64(count: int, seed: Tensor) -> Tensor:
    """The first outputs (count,) of the generator SplitMix64 (Steele, Lea, Flood 2014)."""
    z = torch.arange(count, device=seed.device).mul_(GOLDEN).add_(seed)
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        low_bits = 2 ** (64 - shift) - 1  # int64's >> copies the sign, and this mask removes the copies
        z = (z ^ z >> shift & low_bits) * factor
    return z


def random_bits(x: Tensor, seed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The bits of `dropout_reference` for x (M, K), a block of rows at a time: (block, bits (rows, K))."""
    (M, K), W = x.shape, math.ceil(x.shape[1] / 4)
    blocks = 1
    if x.device.type == "cpu":  # half a megabyte for each thread, which stays in its cache until it is used
        blocks = max(1, math.ceil(M * W / (65536 * torch.get_num_threads())))
    block_rows = math.ceil(M / blocks)
    column_numbers, row_numbers = splitmix64(W + M, seed).split([W, M])
    words = torch.empty(block_rows, W, dtype=torch.int64, device=x.device)
    high_bits = torch.empty_like(words)
    for start in range(0, M, max(block_rows, 1)):
        if start + block_rows > M:  # the last block
            words, high_bits = words[: M - start], high_bits[: M - start]
        torch.mul(row_numbers[start : start + block_rows, None], column_numbers, out=words)
        torch.bitwise_right_shift(words, 32, out=high_bits)
        words.bitwise_xor_(high_bits).mul_(MIX_1)
        yield slice(start, start + block_rows), words.view(torch.int16)[:, :K]


def make_keep_mask(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    if x.is_cuda and why_no_triton(x.device) is None:
        from minift.ops import dropout_triton
        return dropout_triton.keep_mask(x, drop_threshold(rate), seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for rows, bits in random_bits(x, seed):
        torch.gt(bits, drop_threshold(rate), out=keep[rows])
    return keep


def fake_keep_mask(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


# keep_mask(x, rate, seed): the elements of x (M, K) that dropout keeps, as bools.
# With SplitMix64 itself for each word, three times the operations, it took 1.7 times as long, and no test in
# tests/test_dropout.py tells the two kinds of masks apart.
keep_mask = register_op("keep_mask", make_keep_mask, fake_keep_mask)


def make_drop(tensors: list[Tensor], rate: float, seed: Tensor) -> list[Tensor]:
    if tensors[0].device.type != "cpu":
        keep = make_keep_mask(tensors[0], rate, seed)
        return [x * keep for x in tensors]
    outs = [torch.empty_like(x) for x in tensors]
    # threshold_backward(x, bits, t) is x where bits > t, else 0: it compares and selects in one pass, without
    # a mask, in a twentieth of the time of a comparison and a product with bools (bf16). It needs one dtype
    # for both: bf16 would round the bits, so 16-bit numbers are seen as int16.
    dtype = torch.int16 if tensors[0].itemsize == 2 else tensors[0].dtype
    for rows, bits in random_bits(tensors[0], seed):
        bits = bits.to(dtype)
        for x, out in zip(tensors, outs, strict=True):
            x_rows, out_rows = x.view(dtype)[rows], out.view(dtype)[rows]
            torch.ops.aten.threshold_backward.grad_input(
                x_rows, bits, drop_threshold(rate), grad_input=out_rows)
    return outs


def fake_drop(tensors: list[Tensor], rate: float, seed: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


# drop([x, ...], rate, seed): tensors of one shape (M, K), with zeros where keep_mask is False. The other
# elements are not scaled: LoRA puts 1 / (1 - rate) into its own scale.
drop = register_op("drop", make_drop, fake_drop)
