"""Keys and values, kept while rows grow by a token at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.ops.attention import Rows

TOGETHER = 4  # rows that are attended together on a CPU


class KVCache:
    """Keys and values of all blocks, of rows that begin with `lengths` tokens and grow by at most `new`.

    A token at position p of a row sits in slot p, so rows of different lengths need no left padding: what
    lies beyond a row's own position is masked, and overwritten as the row grows. The rows lie in order of
    their lengths, `order` says which ones (`places` the other way round), and a CPU attends a few at a time,
    which have as many slots as the longest of them needs: for 16 rows of 34 to 397 tokens that takes half
    the memory, and two thirds of the time.
    """

    def __init__(self, n_layer: int, n_head: int, hs: int, lengths: list[int], new: int, dtype: torch.dtype,
                 device: torch.device):
        order, B = sorted(range(len(lengths)), key=lambda row: lengths[row]), len(lengths)
        self.order = torch.tensor(order, device=device)
        self.places = self.order.argsort()
        self.lengths = [lengths[row] for row in order]
        self.groups, firsts, end = [], [], 0  # rows, and where in memory their heads' slots are
        together = TOGETHER if device.type == "cpu" else B
        for start in range(0, B, together):
            rows = slice(start, min(start + together, B))
            slots, heads = self.lengths[rows.stop - 1] + new, (rows.stop - start) * n_head
            firsts.append(end + slots * torch.arange(heads).view(-1, n_head))
            self.groups.append((rows, slice(end, end + heads * slots)))
            end += heads * slots
        self.firsts = torch.cat(firsts).to(device)  # (B, nh), in memory
        self.k = torch.zeros(n_layer, end, hs, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def put(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Tokens' k and v (N, nh, hs) into `places` (N nh)."""
        self.k[layer].index_copy_(0, places, k.flatten(0, 1))
        self.v[layer].index_copy_(0, places, v.flatten(0, 1))

    def prefill(self, layer: int, qkv: Tensor, rows: Rows) -> None:
        """What the rows' first tokens, qkv (N, 3C), give to the cache."""
        numbers, positions = rows.numbers[: rows.real], rows.positions[: rows.real]
        _, k, v = qkv[: rows.real].unflatten(1, (3, self.firsts.shape[1], -1)).unbind(1)
        self.put(layer, (self.firsts[self.places[numbers]] + positions[:, None]).flatten(), k, v)

    def grow(self) -> Tensor:
        """A new token in every row: gives their positions (B,), in the cache's order."""
        positions = torch.tensor(self.lengths, device=self.k.device)
        self.new_places = (self.firsts + positions[:, None]).flatten()
        self.lengths = [n + 1 for n in self.lengths]
        self.seen = []
        for rows, _ in self.groups:
            used = torch.arange(self.lengths[rows.stop - 1], device=positions.device)  # slots, of the longest
            self.seen.append((used <= positions[rows, None])[:, None, None])  # (b, 1, 1, used)
        return positions

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """The new tokens' qkv (B, 3C) -> what they make of their rows, themselves included, (B, C)."""
        q, k, v = qkv.unflatten(1, (3, self.firsts.shape[1], -1)).unbind(1)  # (B, nh, hs)
        self.put(layer, self.new_places, k, v)
        y = torch.empty_like(q)
        for (rows, memory), seen in zip(self.groups, self.seen, strict=True):
            shape = rows.stop - rows.start, q.shape[1], -1, q.shape[2]
            past = [x[layer, memory].view(shape)[:, :, : seen.shape[3]] for x in (self.k, self.v)]
            y[rows] = F.scaled_dot_product_attention(q[rows, :, None], *past, seen, scale=scale)[:, :, 0]
        return y.flatten(1)
