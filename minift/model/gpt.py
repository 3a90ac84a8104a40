"""GPT-2 by hand: a decoder-only Transformer with pre-norm blocks, fused qkv, learned positions and a tied
head.

Module names are those of Hugging Face's GPT-2 (wte, wpe, h.0.attn.c_attn, ...), so that a parameter has one
name everywhere. Every weight is stored as (out, in), like torch's Linear; minift/weights.py turns GPT-2's
files round. Letters in shape comments: B rows, T tokens of the longest, N tokens of all rows, C = n_embd,
nh heads, hs = C / nh, V vocabulary, P soft-prompt tokens.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.device import by_onednn
from minift.errors import UserError
from minift.model.cache import KVCache
from minift.ops.attention import Rows, attention
from minift.ops.cross_entropy import head_loss
from minift.ops.gelu import gelu_new
from minift.ops.linear import linear

IGNORE = -100  # a target that is not learned: the prompt's tokens and the padding

ACTIVATIONS = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
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
    """A linear layer that computes in its input's dtype: frozen weights already have it, tuned ones stay in
    fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention; query, key and value come out of one fused matrix."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.layer, self.n_head = layer, config.n_head
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, rows: Rows | None, dropout: float = 0.0, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (N, C) -> (N, 3C)
        if rows is None:
            return self.c_proj(cache.attend(self.layer, qkv, self.scale))
        if cache is not None:
            cache.prefill(self.layer, qkv, rows)
        return self.c_proj(pick(attention(qkv, rows, self.n_head, self.scale, dropout), wanted))


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """(N, C) -> (n, C), the tokens that `wanted` (n,) counts; None: x as it is."""
    return x if wanted is None else x.index_select(0, wanted)


class MLP(nn.Module):
    """Two linear layers with GPT-2's activation between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_width)
        self.c_proj = Linear(config.mlp_width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream.

    `attn_adapter` and `mlp_adapter` are the places where bottleneck adapters go (Houlsby et al. 2019, figure
    2): on a sublayer's output, before it is added. Empty, they are the identity.

    x (N, C) holds `rows` end to end, or, with `rows` None, one new token of each of the cache's rows. With
    `wanted` (n,), what comes out is (n, C): keys and values are made of every token, and all that follows the
    attention of the wanted ones alone.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.attn_adapter = nn.Identity()
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.mlp_adapter = nn.Identity()

    def forward(self, x: Tensor, rows: Rows | None, dropout: float = 0.0, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        attended = self.attn_adapter(self.attn(self.ln_1(x), rows, dropout, cache, wanted))
        x = pick(x, wanted) + F.dropout(attended, dropout)
        return x + F.dropout(self.mlp_adapter(self.mlp(self.ln_2(x))), dropout)


class GPT(nn.Module):
    """The model. `hidden` gives the states, `loss` what training minimises, `generate` (minift/generate.py)
    text.

    `prompt` is the place where a soft prompt goes: a module whose `weight` is (P, C), put before every row.
    `dropout` is GPT-2's embedding, attention and residual dropout while training; 0 until somebody sets it.
    `checkpoint` trades time for memory: a block's activations are computed again in the backward pass.
    `by_row` lists the layers that compute otherwise in each row; `begin` tells them the row of each token.
    `compute_dtype` is what activations are made in; see `set_compute_dtype`. `tokenizer`, `folder` and
    `fingerprint` say where the weights came from; weights.load sets them.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # without initial values: drawing them on the meta device imports torch's compiler, 2 s and 150 MB
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.prompt: nn.Module | None = None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout, self.checkpoint = 0.0, False
        self.by_row: list[Any] = []
        self.compute_dtype = torch.float32
        self.tokenizer: Tokenizer | None = None
        self.folder: Path | None = None
        self.fingerprint: str | None = None

    def init_weights(self, seed: int) -> None:
        """GPT-2's start: normal(0, 0.02), residual projections divided by sqrt(2 n_layer), biases 0, norms
        1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                std = 0.02 / (math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1)
                parameter.data.normal_(0.0, std, generator=generator)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`. Frozen floating-point weights are converted once and for all; tuned ones stay
        fp32 and are cast where they are used, so that the optimizer's small steps are not rounded away."""
        self.compute_dtype = dtype
        for parameter in self.parameters():
            wanted = torch.float32 if parameter.requires_grad else dtype
            # what neither trains nor changes may stay mapped from its file, with matrices the other way round
            if parameter.requires_grad or parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted).contiguous()

    def share(self) -> "GPT":
        """A second model on this one's weights, frozen, of which nothing is copied. A mode can be applied to
        it and a tuned file loaded: both put new tensors in place of shared ones, so this model stays as it
        is, bit for bit, and any number of tuned models serve side by side from one base."""
        known: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.parameters()}
        return copy.deepcopy(self, known | {id(self.tokenizer): self.tokenizer})

    def set_kernel(self, kernel: str) -> None:
        """Let every layer that has several implementations, an attribute `kernel`, compute by this one."""
        for module in self.modules():
            if hasattr(module, "kernel"):
                module.kernel = kernel

    @property
    def prompt_tokens(self) -> int:
        """How many of the model's positions a soft prompt takes: 0 without one."""
        return 0 if self.prompt is None else self.prompt.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, ids: Tensor, lengths: list[int] | None = None, wanted: Tensor | None = None,
               cache: KVCache | None = None) -> Tensor:
        """Final hidden states, after the last norm, of token ids (B, T), of which a row's first `lengths`
        are real (None: all): (B, T, C), or, with `wanted` (n,), which counts in ids.flatten(), those (n, C)
        alone. Rows with padding need `wanted`, which must not name it.

        Of padding only what makes shapes round is computed, and the last block's projection and MLP take the
        wanted positions alone. A `cache` takes up the rows, for `next_hidden`. Raises UserError when a row
        does not fit into the model's positions.
        """
        P, (B, T) = self.prompt_tokens, ids.shape
        if P + T > self.config.n_positions:
            soft = f" and {P} of the soft prompt" if P else ""
            raise UserError(f"{T} tokens{soft} do not fit into the model's {self.config.n_positions} "
                            "positions: shorten the text, or lower --max-length or --max-new-tokens")
        few_shapes = by_onednn(self.device, self.compute_dtype)
        rows = Rows([P + n for n in lengths or [T] * B], self.device, few_shapes)
        x = self.wte(ids[rows.numbers, (rows.positions - P).clamp(min=0)])  # (B, T) -> (N, C)
        if self.prompt is not None:
            soft = F.embedding(rows.positions.clamp(max=P - 1), self.prompt.weight.to(x.dtype))
            x = torch.where((rows.positions < P)[:, None], soft, x)
        x = x + self.wpe(rows.positions)
        every = torch.arange(B * T, device=self.device) if wanted is None else wanted
        inner = rows.starts[every // T] + P + every % T  # counted in N
        for layer in self.by_row:
            layer.begin(B, rows.numbers)
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(x.to(self.compute_dtype), dropout)
        for block in self.h:
            last = inner if block is self.h[-1] and not self.by_row else None
            if self.checkpoint and self.training:
                x = checkpoint(block, x, rows, dropout, cache, last, use_reentrant=False)
            else:
                x = block(x, rows, dropout, cache, last)
        x = self.ln_f(pick(x, inner) if self.by_row else x)
        return x.view(B, T, -1) if wanted is None else x

    def next_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Final hidden states (B, C) of one more token in each of the cache's rows, tokens (B,)."""
        positions = cache.grow()
        x = (self.wte(tokens[cache.order]) + self.wpe(positions)).to(self.compute_dtype)
        for layer in self.by_row:
            layer.begin(len(tokens), cache.order)
        for block in self.h:
            x = block(x, None, cache=cache)
        return self.ln_f(x)[cache.places]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) in fp32; the head is the token embedding."""
        return linear(hidden, self.wte.weight.to(hidden.dtype), None).float()

    def loss(self, ids: Tensor, targets: Tensor, lengths: list[int] | None = None) -> Tensor:
        """The sum of -log p over the target tokens, in nats. ids, targets: (B, T), of which a row's first
        `lengths` are real (None: all); targets[b, t] is the token after ids[b, t], or IGNORE. Only target
        positions pass the last block's MLP and meet the vocabulary: the prompt's logits are never made."""
        learned = (targets != IGNORE).flatten().nonzero()[:, 0]  # (n,)
        wanted = F.pad(learned, (0, -len(learned) % 64))  # few shapes: each step has its own n
        hidden = self.hidden(ids, lengths, wanted.to(ids.device))  # (n + padding, C)
        return head_loss(hidden, self.wte.weight, targets.flatten()[learned].to(ids.device))


def compare_shapes(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> list[str]:
    """Every difference between the expected names and shapes and those found, one string each."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not expected" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            differences.append(f"{name} is {tuple(found[name])} and not {tuple(shape)}")
    return sorted(differences)
