"""GPT-2 from scratch: a decoder-only Transformer with pre-norm blocks, fused query, key and value, learned positions
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
from minift.distributed import is_shard, is_sharded
from minift.errors import UserError
from minift.model.cache import KVCache
from minift.model.packing import Batch, Row, pack
from minift.ops.attention import PackedRows, attention
from minift.ops.cast import cast_together
from minift.ops.cross_entropy import cross_entropy
from minift.ops.gelu import gelu_tanh
from minift.ops.linear import linear
from minift.ops.norm import add_norm

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
    """A linear layer that computes in the dtype of its input. Frozen weights are stored in that dtype, tuned weights in
    fp32; they are cast here. Modes replace it by subclasses."""

    kernel = "auto"  # the implementation of the low-rank update of a subclass; see GPT.set_kernel

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def set_constant(self, constant: bool) -> None:
        """Called with True, then with False; between the calls parameters do not change. So a subclass may keep tensors
        that it derives from them (a cast, a norm). Decoding calls both."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation of the residual stream, in the dtype of its input. It first adds the output of the sublayer
    before it, so that both can be one kernel."""

    kernel = "auto"  # see GPT.set_kernel

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (N, C) and a branch (N, C), or None -> x + branch, and its normalisation."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return add_norm(x, branch, weight, bias, self.eps, self.kernel)


class Attention(nn.Module):
    """Causal multi-head self-attention. Query, key and value are the outputs of one fused matrix.

    `prefix` is the slot for prefix tuning (Li and Liang 2021): a module whose `weight` (P, 2C) has keys and values.
    They replace those of the P reserved positions in front of each row, so every token of a row attends to them.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.prefix: nn.Module | None = None
        self.layer, self.n_head = layer, config.n_head
        # 1 / sqrt(hs): the variance of q k^T grows with hs, and softmax would saturate (Vaswani et al. 2017)
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:  # Stanford's Mistral models: against overflow in fp16
            self.scale /= layer + 1

    def forward(self, x: Tensor, rows: PackedRows, dropout: float = 0.0, cache: KVCache | None = None,
                selected: Tensor | None = None) -> Tensor:
        """Attention within each packed row, (N, C) -> (N, C), or (n, C) of the tokens that `selected` (n,)
        indexes. A `cache` takes the keys and values."""
        qkv = self.c_attn(x)  # (N, C) -> (N, 3C)
        # before the cache is filled, so that the prefix is in it when decoding
        if self.prefix is not None:
            qkv = put_prefix(qkv, self.prefix.weight.to(qkv.dtype), rows.positions)
        if cache is not None:
            cache.prefill(self.layer, qkv, rows)
        y = attention(qkv, rows, self.n_head, self.scale, dropout)  # (N, C)
        # keys and values need all tokens, but the projection only the selected ones
        return self.c_proj(select_tokens(y, selected))  # (N, C) -> (n, C)

    def next(self, x: Tensor, cache: KVCache) -> Tensor:
        """The same for one new token in each of the cache's rows, (B, C) -> (B, C)."""
        qkv = self.c_attn(x)  # (B, C) -> (B, 3C)
        y = cache.attend(self.layer, qkv, self.scale)  # (B, C)
        return self.c_proj(y)


def put_prefix(qkv: Tensor, prefix: Tensor, positions: Tensor) -> Tensor:
    """Replace the keys and values of the first P positions of each row by prefix (P, 2C): qkv (N, 3C) -> (N, 3C)."""
    P, C = prefix.shape[0], prefix.shape[1] // 2
    # the clamp only makes the other positions valid indices; `where` drops their values
    learned = F.embedding(positions.clamp(max=P - 1), prefix)  # (N, 2C)
    keys_values = torch.where((positions < P)[:, None], learned, qkv[:, C:])  # (N, 2C)
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

    `attn_adapter` and `mlp_adapter` are slots for bottleneck adapters (Houlsby et al. 2019, figure 2). They get the
    output of a sublayer, before it is added to the residual stream. An empty slot is the identity.

    A block does not add the output of its MLP, the `branch`, to the residual stream x. The next norm does: that of the
    next block, or the last norm of the model. With `checkpoint`, GPT.hidden does.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.attn_adapter = nn.Identity()
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.mlp_adapter = nn.Identity()

    def forward(self, x: Tensor, branch: Tensor | None, rows: PackedRows, dropout: float = 0.0,
                cache: KVCache | None = None, selected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (N, C), and the branch (N, C) that is still to be added to it, or None -> both for the next block: (N, C),
        or (n, C) of the tokens that `selected` (n,) indexes. Keys and values use all tokens."""
        x, normed = self.ln_1(x, branch)
        attended = self.attn(normed, rows, dropout, cache, selected)
        return self.after_attention(select_tokens(x, selected), attended, dropout)

    def next(self, x: Tensor, branch: Tensor | None, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The same for one new token in each of the cache's rows, (B, C) -> (B, C)."""
        x, normed = self.ln_1(x, branch)
        attended = self.attn.next(normed, cache)
        return self.after_attention(x, attended, dropout=0.0)

    def after_attention(self, x: Tensor, attended: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """x plus the output of attention; and the output of the MLP, which is the next branch."""
        # no `training` argument for F.dropout: GPT.hidden passes a rate of 0 when the model does not train
        x, normed = self.ln_2(x, F.dropout(self.attn_adapter(attended), dropout))
        return x, F.dropout(self.mlp_adapter(self.mlp(normed)), dropout)


def select_tokens(x: Tensor, selected: Tensor | None) -> Tensor:
    """(N, C) -> (n, C), the tokens that `selected` (n,) indexes; None selects all."""
    return x if selected is None else x.index_select(0, selected)


class GPT(nn.Module):
    """The model. Its tokenizer, folder and fingerprint belong to the base (minift/files/weights.py)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # from_pretrained: nn.Embedding draws random values, which on the meta device imports torch's compiler (2 s)
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

        # Settings, changed after construction.
        # The slot for a soft prompt: a module whose `weight` (P, C) replaces the embeddings of the reserved positions.
        self.prompt: nn.Module | None = None
        # P, the reserved positions in front of every row; set by a mode that fills `prompt`, or `prefix` of attention.
        self.prompt_tokens = 0
        self.dropout = 0.0  # GPT-2's embedding, attention and residual dropout, in training
        self.checkpoint = False  # recompute a block's activations in the backward pass: less memory, more time
        # Layers that compute differently in each row. Before every pass, each gets `set_rows(row_ids, positions)` of
        # the tokens in the pass.
        self.per_row_layers: list[Any] = []
        # Of activations, and the linear layers whose parameters are cast to it; see set_compute_dtype.
        self.compute_dtype = torch.float32
        self.trained_layers: list[Linear] = []

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
                std = 0.02
                if name.endswith("c_proj.weight"):
                    # 2 n_layer outputs are added to the residual stream: with this factor their sum has the variance
                    # of one
                    std = 0.02 / math.sqrt(2 * self.config.n_layer)
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
            # the first P positions of each row take the soft prompt; their token ids have no meaning
            soft = self.prompt.weight.to(x.dtype)  # (P, C)
            soft = F.embedding(positions.clamp(max=len(soft) - 1), soft)  # (N, C), as in put_prefix
            x = torch.where((positions < self.prompt_tokens)[:, None], soft, x)
        return (x + self.wpe(positions)).to(self.compute_dtype)

    def hidden(self, batch: Batch, selected: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The hidden states after the last norm: (n, C) of the tokens that `selected` (n,) indexes, or (N, C) of all.
        A `cache` takes the keys and values of the rows, for `next_hidden`.

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
        branch = None  # the first block has none to add
        for block in self.h:
            # After attention in the last block, only the selected tokens are needed: in training those before a
            # target, some 15 % of all. Layers in per_row_layers get every token, so then nothing is left out.
            needed = selected if block is self.h[-1] and not self.per_row_layers else None
            if self.checkpoint and self.training:
                # a checkpoint keeps its inputs until the backward pass: one sum takes less memory than x and branch
                x = x if branch is None else x + branch
                x, branch = checkpoint(block, x, None, rows, dropout, cache, needed, use_reentrant=False)
            else:
                x, branch = block(x, branch, rows, dropout, cache, needed)
        if self.per_row_layers:
            x = select_tokens(x, selected)
            branch = select_tokens(branch, selected)
        _, normed = self.ln_f(x, branch)
        return normed

    def next_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The hidden states (B, C), after the last norm, of one new token in each of the cache's rows: tokens (B,)."""
        positions = cache.advance()  # (B,), in the cache's order of rows
        for layer in self.per_row_layers:
            layer.set_rows(cache.order, positions)
        x = self.embed(tokens[cache.order], positions)
        branch = None
        for block in self.h:
            x, branch = block.next(x, branch, cache)
        _, normed = self.ln_f(x, branch)
        return normed[cache.inverse_order]  # the caller's order of rows

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) in fp32; the head is the token embedding (tied weights)."""
        return linear(hidden, self.wte.weight, None).float()

    def loss(self, batch: Batch) -> Tensor:
        """The training objective: the sum of -log p over the targets of the batch, in nats. Logits are computed for
        targets alone. Validation and scores have their own loss (minift/report/metrics.py)."""
        with self.casts():
            hidden = self.hidden(batch, batch.padded_positions)  # (n or more, C)
        # ignores those after the first n
        return cross_entropy(hidden, self.wte.weight, batch.targets, batch.has_padding)

    def casts(self) -> contextlib.AbstractContextManager[None]:
        """On a GPU, the trained parameters of all linear layers in the compute dtype, made by a few kernels for the
        passes that run while it is entered. With FSDP2 a block's parameters have that dtype already."""
        parameters = [p for layer in self.trained_layers for p in layer._parameters.values()
                      if p is not None and p.dtype != self.compute_dtype]
        if self.device.type == "cpu" or not parameters or is_shard(parameters[0]):
            return contextlib.nullcontext()
        return cast_together(list(dict.fromkeys(parameters)), self.compute_dtype)  # a shared one once

    # ---- settings

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`. Frozen weights are converted now. Tuned weights stay in fp32 and are cast at each use: in
        bf16, the small steps of the optimizer would be rounded away."""
        self.compute_dtype = dtype
        # kept, as to find them in each step would take the host longer than the casts
        self.trained_layers = [layer for layer in self.linear_layers()
                               if any(p.requires_grad for p in layer.parameters(recurse=False))]
        for parameter in self.parameters():
            tuned = parameter.requires_grad
            stored = torch.float32 if tuned else dtype
            if not tuned and parameter.dtype == stored:
                continue  # it may stay mapped from its file
            source = parameter.data
            # copy: a tuned weight that has the dtype already is shared with the base, which must not change
            parameter.data = source.to(stored, copy=tuned, memory_format=torch.contiguous_format)
            release_pages(source)  # the base's file need not stay in memory beside the copy

    def set_kernel(self, kernel: str) -> None:
        """Choose the implementation of low-rank updates and norms, one of ops.kernel_choice.KERNELS."""
        for module in self.modules():
            if isinstance(module, Linear | LayerNorm):
                module.kernel = kernel

    def linear_layers(self) -> list[Linear]:
        return [module for module in self.modules() if isinstance(module, Linear)]

    @contextlib.contextmanager
    def constant_parameters(self) -> Iterator[None]:
        """While entered, parameters do not change, and layers may keep tensors that they derive from them."""
        # with FSDP2 a rank holds a part of each weight, from which nothing can be derived
        layers = [] if is_sharded(self) else self.linear_layers()
        for layer in layers:
            layer.set_constant(True)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_constant(False)

    def shared_copy(self) -> "GPT":
        """A second, frozen model that shares the weights of this one, so it needs almost no memory.

        A mode, `set_compute_dtype` and a tuned file put new tensors in the place of shared ones, and never write into
        them. So this model does not change.
        """
        # deepcopy takes the copy of an object from this dictionary, {id: copy}, if it is there
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.parameters()}
        return copy.deepcopy(self, shared)


def compare_shapes(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> list[str]:
    """Every difference between the expected names and shapes and those found, as a phrase for an error message."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not expected" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            differences.append(f"{name} is {tuple(found[name])} and not {tuple(shape)}")
    return sorted(differences)
