"""Dropout's masks: their rate, their independence, and their bits against a generator in Python's numbers."""

import pytest
import torch

from minift.ops.dropout import drop, dropout_reference, keep_mask

SEED = torch.tensor(3)


@pytest.mark.parametrize("rate", [0.0001, 0.1, 0.5, 0.9, 0.99999, 0.9999999])
def test_dropout_rate(rate: float) -> None:
    x, count = torch.empty(999, 1001), 999 * 1001
    kept = keep_mask(x, rate, SEED).sum().item()
    step = 1 / 65536  # the rate is honoured to that
    assert abs(kept - (1 - rate) * count) <= 5 * (max(rate * (1 - rate), step) * count) ** 0.5 + step * count


def test_dropout_masks_follow_their_seed_and_nothing_else() -> None:
    x = torch.empty(33, 7)
    first = keep_mask(x, 0.5, SEED)
    torch.manual_seed(9)
    assert torch.equal(first, keep_mask(x + 1, 0.5, SEED))
    assert not torch.equal(first, keep_mask(x, 0.5, SEED + 1))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_are_independent_of_their_neighbours_and_of_other_seeds(rate: float) -> None:
    """Correlations of 160,000 elements: 0.015 is six standard deviations."""
    x = torch.empty(400, 400)
    big = keep_mask(x, rate, SEED).double()
    pairs = [(big[:, :-lag], big[:, lag:]) for lag in (1, 2, 3, 4, 8, 64)]
    pairs += [(big[:-lag], big[lag:]) for lag in (1, 2, 16)]
    pairs += [(big, keep_mask(x, rate, seed).double()) for seed in (SEED + 1, SEED ^ 2**40, ~SEED)]
    for one, other in pairs:
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.015
    for rates in (big.mean(0), big.mean(1)):  # of every column, and of every row
        assert (rates - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / 400) ** 0.5


def test_rows_and_columns_are_related_in_no_way() -> None:
    """Correlations of every two rows and of every two columns, and of the products of every two elements of a
    word: 2 million each. Without the last product of `random_bits`, one is 17 standard deviations."""
    rows, columns = 2048, 4096
    signs = torch.where(keep_mask(torch.empty(rows, columns), 0.5, SEED), 1.0, -1.0)
    words = signs.view(rows, -1, 4)
    for of in [signs] + [words[..., i] * words[..., j] for i in range(4) for j in range(i)]:
        for side in (of, of[:, :1024].T):
            related = (side @ side.T).fill_diagonal_(0).abs().max() / side.shape[1] ** 0.5
            assert related < 6.5  # 5.2 is to be expected


def splitmix64(seed: int, index: int) -> int:
    """Output `index` of the generator of Steele, Lea and Flood (2014) from `seed`, in Python's numbers."""
    z = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def word(row: int, column: int) -> int:
    """Of the mask, from its row's number and its word column's."""
    product = row * column % 2**64
    high = product >> 32 | (0xFFFFFFFF00000000 if product >> 63 else 0)
    return (product ^ high) * 0xBF58476D1CE4E5B9 % 2**64


def test_masks_are_the_bits_that_are_written_down() -> None:
    """First SplitMix64, against the published outputs for seed 1234567; then more than one piece of rows."""
    assert [splitmix64(1234567, i) for i in (1, 2, 3)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423]  # fmt: skip
    rows, columns = 300, 1001  # 251 words a row, the last one for a single column
    numbers = [splitmix64(2**63 - 5, i) for i in range(251 + rows)]
    words = [word(row, column) for row in numbers[251:] for column in numbers[:251]]
    halves = torch.tensor([(word >> 16 * i) % 2**16 for word in words for i in range(4)])
    values = (halves ^ 0x8000).view(rows, 1004)[:, :columns]  # as a signed comparison orders them
    for rate in (0.1, 0.5, 0.75):
        kept = keep_mask(torch.empty(rows, columns), rate, torch.tensor(2**63 - 5))
        assert torch.equal(kept, values >= round(rate * 65536))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.99999])
def test_what_is_dropped_is_zero_and_the_rest_as_it_was(dtype: torch.dtype, rate: float) -> None:
    """In more than one piece, of a matrix as it lies and of a transposed one, with what is not a number."""
    x, other = torch.randn(300, 1001).to(dtype), torch.randn(1001, 300).to(dtype).T
    x[0, :9], x[1, :9] = torch.inf, -0.0
    keep = keep_mask(x, rate, SEED)
    for given, got in zip((x, other), drop([x, other], rate, SEED), strict=True):
        assert torch.equal(got, given.where(keep, 0)) and got.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns, rate", [(37, 21, 0.3), (301, 1002, 0.1), (1, 1, 0.5), (0, 8, 0.5)])
def test_the_reference_is_the_same(dtype: torch.dtype, rows: int, columns: int, rate: float) -> None:
    """Value and gradient: the fast version's backward pass is the same function of the gradient."""
    x, dy = torch.randn(2, rows, columns).to(dtype)
    x.requires_grad_()
    y = dropout_reference(x, rate, SEED)
    y.backward(dy)
    fast_y, fast_dx = drop([x.detach(), dy / (1 - rate)], rate, SEED)
    assert torch.equal(fast_y / (1 - rate), y) and torch.equal(fast_dx, x.grad)
