"""The model against transformers' GPT-2, and what its hidden states and loss promise."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minift.model.gpt
from minift.errors import UserError
from minift.files import weights
from minift.files.weights import CONV1D
from minift.model.gpt import GPT, IGNORE, GPTConfig
from minift.ops import cross_entropy as loss

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


def random_ids(model: GPT, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def some_targets(ids: torch.Tensor) -> torch.Tensor:
    """The next tokens, of which each row learns another stretch."""
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    for row in range(len(ids)):
        targets[row, : 3 + row] = IGNORE
    return targets


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
@torch.no_grad()
def test_logits_equal_transformers(
    make_reference: Callable, from_reference: Callable, changes: dict[str, Any]
) -> None:
    reference = make_reference(**changes)
    model = from_reference(reference)
    ids = random_ids(model, 3, 17)
    wanted = reference(ids).logits
    assert wanted.std() > 0.5  # else a tolerance of 1e-4 would say little
    assert (model.logits(model.hidden(ids)) - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_logits_of_a_real_folder_equal_transformers() -> None:
    folder = os.environ.get("MINIFT_GPT2_FOLDER")
    if not folder:
        pytest.skip("MINIFT_GPT2_FOLDER does not name a GPT-2 folder")
    from transformers import GPT2LMHeadModel

    model = weights.load(folder).model.eval()
    reference = GPT2LMHeadModel.from_pretrained(folder).float().eval()
    ids = random_ids(model, 2, 37)
    assert (model.logits(model.hidden(ids)) - reference(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [512, 7])
def test_loss_and_gradients_equal_transformers(
    make_reference: Callable, from_reference: Callable, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(loss, "TOKEN_BLOCK", chunk)
    reference = make_reference()
    model = from_reference(reference)
    ids = random_ids(model, 3, 17)
    targets = some_targets(ids)
    labels = torch.cat([torch.full((3, 1), IGNORE), targets[:, :-1]], dim=1)  # shifted again there
    wanted = reference(ids, labels=labels).loss * (targets != IGNORE).sum()
    ours = model.loss(ids, targets)
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
    ids = random_ids(model, 2, 5)
    loss = model.loss(ids, torch.full_like(ids, IGNORE))
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())
    assert model.logits(model.hidden(ids)[0, :0]).shape == (0, model.config.vocab_size)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(make_gpt: Callable) -> None:
    model = make_gpt()
    ids = random_ids(model, 2, 11)
    targets = some_targets(ids)
    padded = F.pad(ids, (0, 6), value=5)
    assert torch.allclose(model.hidden(padded)[:, :11], model.hidden(ids), atol=1e-5)
    padded_targets = F.pad(targets, (0, 6), value=IGNORE)
    assert torch.allclose(model.loss(padded, padded_targets), model.loss(ids, targets))
    assert torch.allclose(model.loss(padded, padded_targets, [11, 11]), model.loss(ids, targets))


@pytest.mark.parametrize("soft", [0, 5])
def test_ragged_rows_give_what_each_row_gives_alone(make_gpt: Callable, soft: int) -> None:
    """Loss and every gradient; lengths on both sides of every rounding, and prompts of all lengths."""
    model = make_gpt(n_positions=96)
    if soft:
        model.prompt = nn.Embedding(soft, model.config.n_embd)
    lengths = [1, 15, 16, 17, 40, 91]
    ids, targets = random_ids(model, 6, 91), torch.full((6, 91), IGNORE)
    for row, n in enumerate(lengths):
        targets[row, n // 2 : n] = ids[row, n // 2 : n].flip(0)
    together = model.loss(ids, targets, lengths)
    together.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(model.loss(ids[row : row + 1, :n], targets[row : row + 1, :n])
                for row, n in enumerate(lengths))
    alone.backward()
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_only_targets_meet_the_vocabulary(make_gpt: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gpt()
    seen, cross_entropy = [], minift.model.gpt.cross_entropy
    monkeypatch.setattr(
        minift.model.gpt,
        "cross_entropy",
        lambda hidden, *rest: seen.append(hidden.shape) or cross_entropy(hidden, *rest),
    )
    ids = random_ids(model, 3, 17)
    targets = some_targets(ids)
    model.loss(ids, targets)
    count = (targets != IGNORE).sum().item()
    assert seen == [(count + -count % 64, model.config.n_embd)]


def test_gradients_flow_only_where_they_are_asked_for(make_gpt: Callable) -> None:
    model = make_gpt().requires_grad_(False)
    model.h[1].mlp.c_fc.bias.requires_grad_(True)
    ids = random_ids(model, 2, 9)
    model.loss(ids, some_targets(ids)).backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    assert touched == ["h.1.mlp.c_fc.bias"]
    assert model.h[1].mlp.c_fc.bias.grad.abs().min() > 0


@torch.no_grad()
def test_bf16_stays_close_to_fp32_and_keeps_tuned_parameters_in_fp32(make_gpt: Callable) -> None:
    model = make_gpt()
    ids = random_ids(model, 3, 17)
    exact = model.hidden(ids)
    model.requires_grad_(False)
    last = model.h[2]
    tuned = [model.wte.weight, last.ln_1.weight, last.attn.c_attn.weight, last.mlp.c_fc.bias]
    for parameter in tuned:
        parameter.requires_grad_(True)
    model.set_compute_dtype(torch.bfloat16)
    assert {id(p) for p in model.parameters() if p.dtype == torch.float32} == {id(p) for p in tuned}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    close = model.hidden(ids)
    assert close.dtype == torch.bfloat16 and model.logits(close).dtype == torch.float32
    error = (close.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


@torch.no_grad()
def test_dropout_acts_in_training_alone(make_gpt: Callable) -> None:
    model = make_gpt()
    ids = random_ids(model, 2, 9)
    without = model.hidden(ids)
    model.dropout = 0.3
    assert torch.equal(model.hidden(ids), without)
    model.train()
    torch.manual_seed(0)
    first, second = model.hidden(ids), model.hidden(ids)
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
    ids, results = random_ids(model, 2, 9), []
    for _ in range(2):
        hidden = model.hidden(ids)
        results.append(spy.seen if place == "attention" else hidden)
    assert not torch.allclose(*results, atol=1e-3)


class _Spy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


def test_context_limit(make_gpt: Callable) -> None:
    model = make_gpt()
    model.hidden(random_ids(model, 1, 96))
    with pytest.raises(UserError, match="97 tokens do not fit into the model's 96 positions"):
        model.hidden(random_ids(model, 1, 97))
    model.prompt = nn.Embedding(10, model.config.n_embd)
    assert model.hidden(random_ids(model, 1, 86)).shape == (1, 86, 24)
    with pytest.raises(UserError, match="87 tokens and 10 of the soft prompt"):
        model.hidden(random_ids(model, 1, 87))


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


def test_hidden_leaves_the_soft_prompts_states_out(make_gpt: Callable) -> None:
    model = make_gpt()
    model.prompt = nn.Embedding(4, model.config.n_embd)
    assert model.prompt_tokens == 4
    assert model.hidden(random_ids(model, 2, 7)).shape == (2, 7, model.config.n_embd)


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
