"""The model against transformers' GPT-2, and what its hidden states and loss promise."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed import hidden, learned_from, logits, random_ids, without_targets
from torch import nn

from minift.errors import UserError
from minift.files import weights
from minift.files.weights import CONV1D
from minift.model.generate import generate
from minift.model.gpt import GPT, GPTConfig, Linear
from minift.model.packing import Batch, Row
from minift.report.metrics import measure_losses
from minift.training import train_step

SWITCHES: dict[str, dict[str, Any]] = {
    "three heads": {},
    "five heads, narrow MLP": dict(vocab_size=61, eos_token_id=0, n_embd=40, n_head=5, n_layer=2, n_inner=56),
    "scores not scaled": dict(scale_attn_weights=False),
    "scores scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "scores scaled by layer only": dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False),
    "large epsilon": dict(layer_norm_epsilon=0.1),
    "exact GELU": dict(activation_function="gelu"),
    "ReLU": dict(activation_function="relu"),
    "SiLU": dict(activation_function="silu"),
    "tanh GELU by its other name": dict(activation_function="gelu_pytorch_tanh"),
}


def ids_for(model: GPT, rows: int, tokens: int) -> torch.Tensor:
    return random_ids(model.config.vocab_size, rows, tokens)


def some_rows(ids: torch.Tensor) -> list[Row]:
    """Each row learns another stretch, up to its end."""
    return learned_from(ids, range(4, 4 + len(ids)))


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_logits_equal_transformers(
    make_reference: Callable, from_reference: Callable, changes: dict[str, Any]
) -> None:
    reference = make_reference(**changes)
    model = from_reference(reference)
    ids = ids_for(model, 3, 17)
    wanted = reference(ids).logits
    assert wanted.std() > 0.5  # else a tolerance of 1e-4 would say little
    assert (logits(model, ids) - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_logits_of_a_real_folder_equal_transformers() -> None:
    folder = os.environ.get("MINIFT_GPT2_FOLDER")
    if not folder:
        pytest.skip("MINIFT_GPT2_FOLDER does not name a GPT-2 folder")
    from transformers import GPT2LMHeadModel

    model, reference = weights.load(folder).model.eval(), GPT2LMHeadModel.from_pretrained(folder).float().eval()
    ids = ids_for(model, 2, 37)
    assert (logits(model, ids) - reference(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(3, 17), (9, 90)])  # of the second, the vocabulary sees several chunks
def test_loss_and_gradients_equal_transformers(
    make_reference: Callable, from_reference: Callable, shape: tuple[int, int]
) -> None:
    reference = make_reference()
    model = from_reference(reference)
    ids = ids_for(model, *shape)
    rows, labels = some_rows(ids), ids.clone()  # transformers shifts the labels itself
    for row, label in zip(rows, labels, strict=True):
        label[: row.spans[0][0]] = -100
    wanted = reference(ids, labels=labels).loss * sum(row.num_targets for row in rows)
    ours = model.loss(model.pack(rows))
    assert torch.allclose(ours, wanted, rtol=1e-5)
    (wanted / 7).backward()
    (ours / 7).backward()
    for name, parameter in reference.transformer.named_parameters():
        grad = model.get_parameter(name).grad
        grad = grad.T if CONV1D.fullmatch(name) else grad
        assert torch.allclose(grad, parameter.grad, rtol=1e-3, atol=1e-4 * grad.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_without_a_target_is_zero(make_gpt: Callable, dtype: torch.dtype) -> None:
    """As on a rank that an uneven last batch leaves without rows: no token passes the last block's MLP."""
    model = make_gpt()
    model.set_compute_dtype(dtype)
    batch = without_targets(model, ids_for(model, 2, 5))
    loss = model.loss(batch)
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())
    none = model.hidden(batch, batch.target_positions)
    assert model.logits(none).shape == (0, model.config.vocab_size)


@pytest.mark.parametrize("soft", [0, 5])
def test_ragged_rows_give_what_each_row_gives_alone(make_gpt: Callable, soft: int) -> None:
    """Loss and every gradient; lengths on both sides of every rounding, and prompts of all lengths."""
    model = make_gpt(n_positions=96)
    if soft:
        model.prompt, model.prompt_tokens = nn.Embedding(soft, model.config.n_embd), soft
    lengths = [1, 15, 16, 17, 40, 91]
    ids = ids_for(model, 6, 92).tolist()
    rows = [Row(ids[i][: n + 1], ((n // 2 + 1, n + 1),)) for i, n in enumerate(lengths)]
    together = model.loss(model.pack(rows))
    together.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(model.loss(model.pack([row])) for row in rows)
    alone.backward()
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_only_targets_meet_the_vocabulary(make_gpt: Callable) -> None:
    """The last norm's output is the head's input."""
    model, seen = make_gpt(), []
    model.ln_f.register_forward_hook(lambda _, inputs, output: seen.append(output[1].shape))
    rows = some_rows(ids_for(model, 3, 17))
    model.loss(model.pack(rows))
    count = sum(row.num_targets for row in rows)
    assert seen == [(count + -count % 64, model.config.n_embd)]


def test_checkpointing_changes_no_gradient(make_gpt: Callable) -> None:
    model = make_gpt().train()
    batch, gradients = model.pack(some_rows(ids_for(model, 3, 17))), []
    for model.checkpoint in (False, True):
        model.zero_grad()
        model.loss(batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class RowScale(Linear):
    """A layer that multiplies each row's outputs by that row's own factor."""

    def __init__(self, base: Linear, factors: torch.Tensor):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.factors = base.weight, base.bias, factors

    def set_rows(self, row_ids: torch.Tensor, positions: torch.Tensor) -> None:
        self.row_ids = row_ids

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factors[self.row_ids, None]


@pytest.mark.parametrize("layer", ["h.0.attn.c_attn", "h.2.mlp.c_fc"])
def test_a_layer_can_differ_from_row_to_row(make_gpt: Callable, layer: str) -> None:
    """In a batch each row gives what it gives alone with its factor, in training and in decoding; in the last
    block's MLP too, which otherwise sees the targets alone."""
    factors = torch.tensor([0.5, 1.0, 1.5, -1.0, 2.0])
    prompts = [[5, 17, 80], [1], [33, 2, 9, 61, 44, 7, 20], [90, 90], [61, 3, 19, 4, 11]]
    rows = [Row([*prompt, *range(10 + i, 20)], ((len(prompt), len(prompt) + 4),))
            for i, prompt in enumerate(prompts)]

    def build(some: torch.Tensor) -> GPT:
        model = make_gpt()
        parent, _, name = layer.rpartition(".")
        scaled = RowScale(model.get_submodule(layer), some)
        setattr(model.get_submodule(parent), name, scaled)
        model.per_row_layers.append(scaled)
        return model

    together = build(factors)
    loss = together.loss(together.pack(rows))
    loss.backward()
    alone, gradient, texts = 0.0, 0.0, []
    for i, row in enumerate(rows):
        model = build(factors[i : i + 1])
        model.loss(model.pack([row])).backward()
        alone += model.loss(model.pack([row])).item()
        gradient += model.wpe.weight.grad
        texts += generate(model, [prompts[i]], 12)
    assert loss.item() == pytest.approx(alone, rel=1e-5)
    assert torch.allclose(together.wpe.weight.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max())
    assert generate(together, prompts, 12) == texts != generate(make_gpt(), prompts, 12)


class SmoothedGPT(GPT):
    """Label smoothing (Szegedy et al. 2016), the whole change of objective: one method."""

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self.logits(self.hidden(batch, batch.target_positions))
        return F.cross_entropy(logits, batch.targets, label_smoothing=0.3, reduction="sum")


def test_another_objective_changes_training_alone(make_gpt: Callable) -> None:
    """Validation and forgetting keep their meaning: they do not use `loss`."""
    model = make_gpt()
    rows = some_rows(ids_for(model, 4, 17))
    batch, before = model.pack(rows), measure_losses(model, rows, batch=2)
    plain = model.loss(batch).item()
    model.__class__ = SmoothedGPT
    smoothed, _ = train_step(model, [rows], clip=1.0).read()
    assert smoothed == pytest.approx(model.loss(batch).item() / len(batch.targets), rel=1e-6)
    assert abs(model.loss(batch).item() - plain) > 1e-3 * plain
    assert measure_losses(model, rows, batch=2) == before


def test_gradients_flow_only_where_they_are_asked_for(make_gpt: Callable) -> None:
    model = make_gpt().requires_grad_(False)
    model.h[1].mlp.c_fc.bias.requires_grad_(True)
    ids = ids_for(model, 2, 9)
    model.loss(model.pack(some_rows(ids))).backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    assert touched == ["h.1.mlp.c_fc.bias"]
    assert model.h[1].mlp.c_fc.bias.grad.abs().min() > 0


@torch.no_grad()
def test_bf16_stays_close_to_fp32_and_keeps_tuned_parameters_in_fp32(make_gpt: Callable) -> None:
    model = make_gpt()
    ids = ids_for(model, 3, 17)
    exact = hidden(model, ids)
    model.requires_grad_(False)
    last = model.h[2]
    tuned = [model.wte.weight, last.ln_1.weight, last.attn.c_attn.weight, last.mlp.c_fc.bias]
    for parameter in tuned:
        parameter.requires_grad_(True)
    model.set_compute_dtype(torch.bfloat16)
    assert {id(p) for p in model.parameters() if p.dtype == torch.float32} == {id(p) for p in tuned}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    close = hidden(model, ids)
    assert close.dtype == torch.bfloat16 and model.logits(close).dtype == torch.float32
    error = (close.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


@torch.no_grad()
def test_dropout_acts_in_training_alone(make_gpt: Callable) -> None:
    model = make_gpt()
    ids = ids_for(model, 2, 9)
    without = hidden(model, ids)
    model.dropout = 0.3
    assert torch.equal(hidden(model, ids), without)
    model.train()
    torch.manual_seed(0)
    first, second = hidden(model, ids), hidden(model, ids)
    assert not torch.allclose(first, without, atol=0.1) and not torch.allclose(first, second, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("place", ["embeddings", "attention", "attention's output", "MLP's output"])
def test_dropout_acts_in_each_of_gpt2s_places(make_gpt: Callable, place: str) -> None:
    model = make_gpt(n_layer=1).train()
    block, spy = model.h[0], _Spy()
    block.attn_adapter, model.dropout = spy, 0.5
    zero = {  # zeros survive dropout, so that one place alone is left where it shows
        "embeddings": [block.attn.c_proj, block.mlp.c_proj],
        "attention": [model.wte, model.wpe],
        "attention's output": [model.wte, model.wpe, block.attn.c_attn, block.mlp.c_proj],
        "MLP's output": [model.wte, model.wpe, block.attn.c_proj],
    }
    for module in zero[place]:
        for parameter in module.parameters():
            parameter.zero_()
    torch.manual_seed(0)
    ids, results = ids_for(model, 2, 9), []
    for _ in range(2):
        states = hidden(model, ids)
        results.append(spy.seen if place == "attention" else states)
    assert not torch.allclose(*results, atol=1e-3)


class _Spy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


def test_context_limit(make_gpt: Callable) -> None:
    model = make_gpt()
    hidden(model, ids_for(model, 1, 96))
    with pytest.raises(UserError, match="97 tokens do not fit into the model's 96 positions"):
        hidden(model, ids_for(model, 1, 97))
    model.prompt, model.prompt_tokens = nn.Embedding(10, model.config.n_embd), 10
    assert hidden(model, ids_for(model, 1, 86)).shape == (1, 86, 24)
    with pytest.raises(UserError, match="87 tokens and 10 reserved ones"):
        hidden(model, ids_for(model, 1, 87))


def test_init_weights_is_gpt2s_start() -> None:
    model = GPT(GPTConfig(vocab_size=200, n_positions=64, n_embd=64, n_layer=8, n_head=4, eos_token_id=0))
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
    again = GPT(model.config)
    again.init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_training_a_shared_copy_leaves_the_base_as_it_is(make_gpt: Callable) -> None:
    base = make_gpt()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = base.shared_copy()
    tuned.requires_grad_(True)
    tuned.set_compute_dtype(torch.float32)  # the dtype that they have already
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
