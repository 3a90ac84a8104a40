"""The key-value cache of decoding: keys and values of all blocks, for rows that grow by one token at a time.

Letters in shape comments as in gpt.py; b is the number of rows in a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.ops.attention import PackedRows

ROWS_PER_CALL = 4  # rows that one attention call takes on a CPU


class KVCache:
    """Keys and values of B rows that begin with `seqlens` tokens each and grow by at most `max_new_tokens`.

    The token at position p of its row lies in slot p of that row. So rows of different lengths need no padding on the
    left: slots after a row's last token are masked, and filled as the row grows.

    The cache sorts its rows by length. `order` (B,) lists the rows in sorted order, and indexing with `inverse_order`
    (B,) restores the caller's order. On a CPU, four rows form a group that shares an attention call, with the slots
    that the longest of the four needs: for 16 rows of 34 to 397 tokens that takes half the memory and two thirds of
    the time of one call for all.
    """

    def __init__(self, n_layer: int, n_head: int, hs: int, seqlens: list[int], max_new_tokens: int,
                 dtype: torch.dtype, device: torch.device):
        B = len(seqlens)
        order = sorted(range(B), key=lambda row: seqlens[row])
        self.order = torch.tensor(order, device=device)
        self.inverse_order = self.order.argsort()
        self.seqlens = [seqlens[row] for row in order]

        # All slots of a layer lie in one flat dimension, since groups have different numbers of slots: first by group,
        # then by row, by head and by position.
        self.groups: list[tuple[slice, slice]] = []  # the rows of a group, and their slots
        slot_offset = []
        end = 0
        rows_per_call = ROWS_PER_CALL if device.type == "cpu" else B  # a GPU is faster with one large call
        for start in range(0, B, rows_per_call):
            stop = min(start + rows_per_call, B)
            heads = (stop - start) * n_head
            slots_per_head = self.seqlens[stop - 1] + max_new_tokens  # the last row of a group is its longest
            first_slots = end + slots_per_head * torch.arange(heads)  # (b nh,)
            slot_offset.append(first_slots.view(-1, n_head))  # (b, nh)
            num_slots = heads * slots_per_head
            self.groups.append((slice(start, stop), slice(end, end + num_slots)))
            end += num_slots
        self.slot_offset = torch.cat(slot_offset).to(device)  # (B, nh): the slot of each row's position 0
        self.k = torch.zeros(n_layer, end, hs, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def put(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the k and v (N, nh, hs) of tokens into `slots` (N nh,)."""
        self.k[layer].index_copy_(0, slots, k.flatten(0, 1))
        self.v[layer].index_copy_(0, slots, v.flatten(0, 1))

    def prefill(self, layer: int, qkv: Tensor, rows: PackedRows) -> None:
        """Write the keys and values of the rows' first tokens, qkv (N, 3C)."""
        num_tokens = rows.num_tokens  # the filler after them has no slots
        sorted_rows = self.inverse_order[rows.row_ids[:num_tokens]]  # (num_tokens,)
        offset = self.slot_offset[sorted_rows]  # (num_tokens, nh)
        slots = offset + rows.positions[:num_tokens, None]
        n_head = offset.shape[1]
        _, k, v = qkv[:num_tokens].unflatten(1, (3, n_head, -1)).unbind(1)  # each (num_tokens, nh, hs)
        self.put(layer, slots.flatten(), k, v)

    def advance(self) -> Tensor:
        """Begin a step with one new token in every row. Returns their positions (B,), in the cache's order of rows.

        Sets what all layers use in this step: these positions, the slots of the new tokens, and the masks.
        """
        self.positions = positions = torch.tensor(self.seqlens, device=self.k.device)
        self.new_slots = (self.slot_offset + positions[:, None]).flatten()  # (B nh,)
        self.seqlens = [seqlen + 1 for seqlen in self.seqlens]
        self.masks = []  # for each group (b, 1, 1, slots in use): True where a row has a token
        for rows, _ in self.groups:
            longest = self.seqlens[rows.stop - 1]
            slots = torch.arange(longest, device=positions.device)
            mask = slots <= positions[rows, None]  # (longest,) <= (b, 1) -> (b, longest)
            self.masks.append(mask[:, None, None])  # the same for all heads and the one query
        return positions

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Attention of each new token over its row, including itself: qkv (B, 3C) -> (B, C)."""
        n_head = self.slot_offset.shape[1]
        q, k, v = qkv.unflatten(1, (3, n_head, -1)).unbind(1)  # each (B, nh, hs)
        self.put(layer, self.new_slots, k, v)
        y = torch.empty_like(q)
        for (rows, slots), mask in zip(self.groups, self.masks, strict=True):
            shape = (rows.stop - rows.start, n_head, -1, q.shape[2])
            in_use = mask.shape[3]  # no row of the group has a token after these slots
            keys = self.k[layer, slots].view(shape)[:, :, :in_use]  # (b, nh, slots in use, hs)
            values = self.v[layer, slots].view(shape)[:, :, :in_use]
            query = q[rows, :, None]  # (b, nh, 1, hs)
            out = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)  # (b, nh, 1, hs)
            y[rows] = out[:, :, 0]
        return y.flatten(1)  # (B, nh, hs) -> (B, C)
