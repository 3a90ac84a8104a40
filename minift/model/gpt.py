"""GPT-2 by hand: a decoder-only Transformer with pre-norm blocks, fused query, key and value, learned positions
and an output head tied to the token embedding (Radford et al. 2019).

Module names are those of Hugging Face's GPT-2 (wte, wpe, h.0.attn.c_attn, ...), so that a parameter has one
name everywhere. Every weight is stored as (out, in), like torch's Linear; GPT-2's files have (in, out), which
minift/files/weights.py transposes.

Letters in shape comments, in the whole project: N tokens of all rows, n target positions, B rows, C = n_embd,
nh heads, hs = C / nh, V vocabulary, r rank, P reserved positions in front of each row (a soft prompt).
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.device import release_pages, uses_onednn_bf16
from minift.distributed import is_sharded
from minift.errors import UserError
from minift.model.cache import KVCache
from minift.model.packing import Batch, Row, pack
from minift.ops.attention import PackedRows, attention
from minift.ops.cross_entropy import cross_entropy
from minift.ops.gelu import gelu_tanh
from minift.ops.linear import linear

ACTIVATIONS = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class GPTConfig:
    """The fields of GPT-2's config.json that change the computation, under the same names; GPT-2 small by
    default."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    eos_token_id: int | None = 50256

    @property
    def mlp_width(self) -> int:
        return self.n_inner or 4 * self.n_embd


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype: frozen weights are stored in it, tuned ones stay in
    fp32 and are cast here. Modes replace it by subclasses."""

    kernel = "auto"  # the implementation of a low-rank update, where a subclass has one; see GPT.set_kernel

    def forward(self, x: Tensor) -> Tensor:
        # .to() returns the tensor itself where the dtype is right already
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)

    def set_constant(self, constant: bool) -> None:
        """True: parameters do not change until the call with False, so a subclass may keep tensors that it
        derives from them (a cast, a norm). Decoding makes both calls."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention. Query, key and value are the outputs of one fused matrix.

    `prefix` is the slot for prefix tuning: a module whose `weight` (P, 2C) has keys and values. They replace
    those of the P reserved positions in front of each row, so every token of a row attends to them.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.prefix: nn.Module | None = None
        self.layer, self.n_head = layer, config.n_head
        # scores are scaled by 1 / sqrt(hs), so that softmax does not saturate for wide heads
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:  # of Mistral's GPT-2: against overflow in fp16
            self.scale /= layer + 1

    def forward(self, x: Tensor, rows: PackedRows, dropout: float = 0.0, cache: KVCache | None = None,
                positions: Tensor | None = None) -> Tensor:
        """Attention within each packed row, (N, C) -> (N, C), or (n, C) of the tokens that `positions` (n,)
        index. A `cache` takes the keys and values."""
        qkv = self.c_attn(x)  # (N, C) -> (N, 3C)
        # before the cache, so that decoding sees the prefix without knowing of it
        if self.prefix is not None:
            qkv = put_prefix(qkv, self.prefix.weight.to(qkv.dtype), rows.positions)
        if cache is not None:
            cache.prefill(self.layer, qkv, rows)
        y = attention(qkv, rows, self.n_head, self.scale, dropout)  # (N, C)
        return self.c_proj(select_tokens(y, positions))  # (n, C)

    def next(self, x: Tensor, cache: KVCache) -> Tensor:
        """The same for one new token in each of the cache's rows, (B, C) -> (B, C)."""
        return self.c_proj(cache.attend(self.layer, self.c_attn(x), self.scale))


def put_prefix(qkv: Tensor, prefix: Tensor, positions: Tensor) -> Tensor:
    """qkv (N, 3C) with the keys and values of the first P positions of each row taken from prefix (P, 2C)."""
    P, C = prefix.shape[0], prefix.shape[1] // 2
    learned = F.embedding(positions.clamp(max=P - 1), prefix)  # (N, 2C)
    keys_values = torch.where((positions < P)[:, None], learned, qkv[:, C:])
    return torch.cat([qkv[:, :C], keys_values], dim=1)


class MLP(nn.Module):
    """Two linear layers with GPT-2's activation between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_width)
        self.c_proj = Linear(config.mlp_width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (N, C) -> (N, 4C)
        return self.c_proj(x)  # (N, 4C) -> (N, C)


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream.

    `attn_adapter` and `mlp_adapter` are slots for bottleneck adapters (Houlsby et al. 2019, figure 2): on a
    sublayer's output, before it is added. Empty, they are the identity.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.attn_adapter = nn.Identity()
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.mlp_adapter = nn.Identity()

    def forward(self, x: Tensor, rows: PackedRows, dropout: float = 0.0, cache: KVCache | None = None,
                positions: Tensor | None = None) -> Tensor:
        """x (N, C) -> (N, C). With `positions` (n,), keys and values use all tokens, but only these outputs
        are computed: (n, C)."""
        attended = self.attn(self.ln_1(x), rows, dropout, cache, positions)
        return self.add_sublayers(select_tokens(x, positions), attended, dropout)

    def next(self, x: Tensor, cache: KVCache) -> Tensor:
        """One new token in each of the cache's rows, (B, C) -> (B, C)."""
        return self.add_sublayers(x, self.attn.next(self.ln_1(x), cache), dropout=0.0)

    def add_sublayers(self, x: Tensor, attended: Tensor, dropout: float) -> Tensor:
        """x plus attention's output, plus the MLP of that sum."""
        x = x + F.dropout(self.attn_adapter(attended), dropout)
        return x + F.dropout(self.mlp_adapter(self.mlp(self.ln_2(x))), dropout)


def select_tokens(x: Tensor, positions: Tensor | None) -> Tensor:
    """(N, C) -> (n, C), the tokens that `positions` (n,) index; None selects all."""
    return x if positions is None else x.index_select(0, positions)


class GPT(nn.Module):
    """The model: its parameters, and how it computes.

    Settings, changed after construction:
    - `prompt`: the slot for a soft prompt, a module whose `weight` is (P, C), put in front of every row.
    - `prompt_tokens`: the reserved positions P in front of every row. A mode that fills `prompt`, or the
      `prefix` of the attention layers, sets it.
    - `dropout`: GPT-2's embedding, attention and residual dropout while training.
    - `checkpoint`: recompute a block's activations in the backward pass: less memory, more time.
    - `per_row_layers`: layers that compute differently in each row. Before every pass each gets
      `set_rows(row_ids, positions)` of the tokens that it will see.
    - `compute_dtype`: the dtype of activations, see `set_compute_dtype`.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # from_pretrained: nn.Embedding would draw values, which on the meta device imports torch's compiler (2 s)
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.prompt: nn.Module | None = None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.prompt_tokens = 0
        self.dropout, self.checkpoint = 0.0, False
        self.per_row_layers: list[Any] = []
        self.compute_dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation: normal(0, 0.02), residual projections divided by sqrt(2 n_layer), biases 0,
        norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                # two residual additions in each block: their variances add up to that of one
                std = 0.02 / (math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1)
                parameter.data.normal_(0.0, std, generator=generator)

    # ---- one pass

    def pack(self, rows: list[Row]) -> Batch:
        """Rows as a batch for this model: with its reserved positions, on its device."""
        round_shapes = uses_onednn_bf16(self.device, self.compute_dtype)
        return pack(rows, self.prompt_tokens, self.device, round_shapes)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids (N,) at positions (N,) of their rows -> the first block's input (N, C)."""
        x = self.wte(tokens)  # (N, C)
        if self.prompt is not None:
            # the first P positions of each row take the soft prompt; their token ids mean nothing
            soft = self.prompt.weight.to(x.dtype)
            soft = F.embedding(positions.clamp(max=len(soft) - 1), soft)  # (P, C) -> (N, C)
            x = torch.where((positions < self.prompt_tokens)[:, None], soft, x)
        return (x + self.wpe(positions)).to(self.compute_dtype)

    def hidden(self, batch: Batch, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Final hidden states after the last norm: (n, C) of the tokens that `positions` (n,) index, or (N, C)
        of all. A `cache` takes the rows' keys and values, for `next_hidden`.

        Raises UserError when a row does not fit into the model's positions.
        """
        rows = batch.rows
        if rows.max_seqlen > self.config.n_positions:
            reserved = f" and {self.prompt_tokens} reserved ones" if self.prompt_tokens else ""
            raise UserError(f"{rows.max_seqlen - self.prompt_tokens} tokens{reserved} do not fit into the model's "
                            f"{self.config.n_positions} positions: shorten the text, or lower --max-length or "
                            "--max-new-tokens")
        for layer in self.per_row_layers:
            layer.set_rows(rows.row_ids, rows.positions)
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(self.embed(batch.tokens, rows.positions), dropout)
        for block in self.h:
            # after the last block's attention only the selected tokens are needed: in training the targets, some
            # 15 % of the tokens. A layer that counts on every token of its rows must get them all.
            selected = positions if block is self.h[-1] and not self.per_row_layers else None
            if self.checkpoint and self.training:
                x = checkpoint(block, x, rows, dropout, cache, selected, use_reentrant=False)
            else:
                x = block(x, rows, dropout, cache, selected)
        if self.per_row_layers:
            x = select_tokens(x, positions)
        return self.ln_f(x)

    def next_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Final hidden states (B, C) of one more token in each of the cache's rows, tokens (B,)."""
        positions = cache.advance()  # (B,), in the cache's order of rows
        for layer in self.per_row_layers:
            layer.set_rows(cache.order, positions)
        x = self.embed(tokens[cache.order], positions)
        for block in self.h:
            x = block.next(x, cache)
        return self.ln_f(x)[cache.inverse_order]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) in fp32; the head is the token embedding (tied weights)."""
        return linear(hidden, self.wte.weight.to(hidden.dtype), None).float()

    def loss(self, batch: Batch) -> Tensor:
        """The training objective: the sum of -log p over the batch's targets, in nats. Only target positions
        meet the vocabulary. Validation and scores do not use it (minift/report/metrics.py)."""
        filler = -len(batch.target_positions) % 64  # each step has its own n: round it for few shapes
        hidden = self.hidden(batch, F.pad(batch.target_positions, (0, filler)))  # (n + filler, C)
        return cross_entropy(hidden, self.wte.weight, batch.targets)

    # ---- how it computes

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`. Frozen weights are converted now; tuned ones stay in fp32 and are cast at each
        use, so that the optimizer's small steps are not rounded away."""
        self.compute_dtype = dtype
        for parameter in self.parameters():
            stored = torch.float32 if parameter.requires_grad else dtype
            # a frozen weight that needs no conversion may stay mapped from its file, transposed
            if parameter.requires_grad or parameter.dtype != stored:
                source = parameter.data
                # a tuned weight is copied even in the right dtype: the optimizer must not change a shared base
                parameter.data = source.to(stored, copy=parameter.requires_grad,
                                           memory_format=torch.contiguous_format)
                release_pages(source)  # of the base's file, which need not stay in memory beside the copy

    def set_kernel(self, kernel: str) -> None:
        """The implementation of low-rank updates, one of ops.lora.KERNELS."""
        for layer in self.linear_layers():
            layer.kernel = kernel

    def linear_layers(self) -> list[Linear]:
        return [module for module in self.modules() if isinstance(module, Linear)]

    @contextlib.contextmanager
    def constant_parameters(self) -> Iterator[None]:
        """While entered, parameters do not change, and layers keep what they derive from them."""
        layers = [] if is_sharded(self) else self.linear_layers()  # nothing can be derived from a part of a weight
        for layer in layers:
            layer.set_constant(True)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_constant(False)

    def shared_copy(self) -> "GPT":
        """A second, frozen model on this one's weights, without copying them. A mode can be applied to it and
        a tuned file loaded: both put new tensors in the place of shared ones, so this model does not change."""
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.parameters()}
        return copy.deepcopy(self, shared)


def compare_shapes(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> list[str]:
    """Every difference between the expected names and shapes and those found, one phrase each."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not expected" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            differences.append(f"{name} is {tuple(found[name])} and not {tuple(shape)}")
    return sorted(differences)
