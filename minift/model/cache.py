"""Keys and values of all blocks, kept while rows grow by one token at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.ops.attention import PackedRows

ROWS_PER_CALL = 4  # rows that one attention call takes on a CPU


class KVCache:
    """Keys and values of B rows that begin with `seqlens` tokens each and grow by at most `max_new_tokens`.

    A token at position p of its row lies in slot p, so rows of different lengths need no left padding: slots
    beyond a row's own position are masked, and overwritten as the row grows.

    Rows are sorted by length. On a CPU four rows share an attention call, with as many slots as the longest of
    the four needs: for 16 rows of 34 to 397 tokens that takes half the memory and two thirds of the time of
    one call. `order` (B,) gives the sorted rows, `inverse_order` their way back.
    """

    def __init__(self, n_layer: int, n_head: int, hs: int, seqlens: list[int], max_new_tokens: int,
                 dtype: torch.dtype, device: torch.device):
        B = len(seqlens)
        order = sorted(range(B), key=lambda row: seqlens[row])
        self.order = torch.tensor(order, device=device)
        self.inverse_order = self.order.argsort()
        self.seqlens = [seqlens[row] for row in order]

        # All slots of a layer lie in one flat dimension: a group's rows, of each row its heads, of each head a slot
        # for every position.
        self.groups: list[tuple[slice, slice]] = []  # rows of one call, and their part of the slots
        slot_offset = []
        end = 0
        rows_per_call = ROWS_PER_CALL if device.type == "cpu" else B
        for start in range(0, B, rows_per_call):
            stop = min(start + rows_per_call, B)
            heads = (stop - start) * n_head
            slots_per_head = self.seqlens[stop - 1] + max_new_tokens  # the group's last row is its longest
            first_slots = end + slots_per_head * torch.arange(heads)
            slot_offset.append(first_slots.view(-1, n_head))
            self.groups.append((slice(start, stop), slice(end, end + heads * slots_per_head)))
            end += heads * slots_per_head
        self.slot_offset = torch.cat(slot_offset).to(device)  # (B, nh): the slot of each row's position 0
        self.k = torch.zeros(n_layer, end, hs, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def put(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write tokens' k and v (N, nh, hs) into `slots` (N nh,)."""
        self.k[layer].index_copy_(0, slots, k.flatten(0, 1))
        self.v[layer].index_copy_(0, slots, v.flatten(0, 1))

    def prefill(self, layer: int, qkv: Tensor, rows: PackedRows) -> None:
        """Write the keys and values of the rows' first tokens, qkv (N, 3C)."""
        real = rows.num_tokens
        offset = self.slot_offset[self.inverse_order[rows.row_ids[:real]]]  # (N, nh)
        _, k, v = qkv[:real].unflatten(1, (3, offset.shape[1], -1)).unbind(1)  # each (N, nh, hs)
        self.put(layer, (offset + rows.positions[:real, None]).flatten(), k, v)

    def advance(self) -> Tensor:
        """Make room for one more token in every row. Returns their positions (B,), in the cache's order."""
        positions = torch.tensor(self.seqlens, device=self.k.device)
        self.new_slots = (self.slot_offset + positions[:, None]).flatten()  # (B nh,)
        self.seqlens = [seqlen + 1 for seqlen in self.seqlens]
        self.masks = []  # for each group (b, 1, 1, slots in use): whether a row has a token there
        for rows, _ in self.groups:
            slots = torch.arange(self.seqlens[rows.stop - 1], device=positions.device)
            self.masks.append((slots <= positions[rows, None])[:, None, None])
        return positions

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Attention of each new token over its row, including itself: qkv (B, 3C) -> (B, C)."""
        n_head = self.slot_offset.shape[1]
        q, k, v = qkv.unflatten(1, (3, n_head, -1)).unbind(1)  # each (B, nh, hs)
        self.put(layer, self.new_slots, k, v)
        y = torch.empty_like(q)
        for (rows, slots), mask in zip(self.groups, self.masks, strict=True):
            shape, in_use = (rows.stop - rows.start, n_head, -1, q.shape[2]), mask.shape[3]
            keys = self.k[layer, slots].view(shape)[:, :, :in_use]  # (b, nh, slots, hs)
            values = self.v[layer, slots].view(shape)[:, :, :in_use]
            out = F.scaled_dot_product_attention(q[rows, :, None], keys, values, mask, scale=scale)
            y[rows] = out[:, :, 0]
        return y.flatten(1)
