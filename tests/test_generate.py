"""Generation against transformers, against itself without a cache, and against distributions by hand."""

from collections.abc import Callable

import pytest
import torch
from packed import learned_from, logits, random_ids
from torch import nn

from minift.errors import UserError
from minift.model.generate import generate, next_tokens
from minift.model.gpt import GPT

# more rows than are attended together, and not by length
PROMPTS = [[5, 17, 80], [1], [33, 2, 9, 61, 44, 7, 20], [90, 90], [61, 3, 19, 4, 11], [*range(40, 51)]]


def soft_prompt(model: GPT, tokens: list[int]) -> GPT:
    """The model with a soft prompt made of real tokens' embeddings."""
    model.prompt = nn.Embedding.from_pretrained(model.wte.weight[tokens].detach().clone())
    model.prompt_tokens = len(tokens)
    return model


@torch.no_grad()
def without_cache(model: GPT, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(logits(model, torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_greedy_continuation_equals_transformers(make_reference: Callable, from_reference: Callable) -> None:
    reference = make_reference(seed=11)
    prompt = PROMPTS[2]
    wanted = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 7:]
    assert len(set(wanted.tolist())) > 5  # a model that repeats one token would hide most faults
    assert generate(from_reference(reference), [prompt], 64) == [wanted.tolist()]


@pytest.mark.parametrize("soft", [[], [3, 50, 8]], ids=["plain", "past a soft prompt"])
def test_a_batch_equals_one_by_one_without_a_cache(make_gpt: Callable, soft: list[int]) -> None:
    model = make_gpt(seed=1)
    if soft:
        soft_prompt(model, soft)
    together = generate(model, PROMPTS, 40)
    assert together == [without_cache(model, prompt, 40) for prompt in PROMPTS]
    assert len({tuple(new) for new in together}) == len(PROMPTS)


def test_a_soft_prompt_of_real_tokens_is_a_prefix(make_gpt: Callable) -> None:
    tokens, model, plain = [11, 42, 7, 7], make_gpt(), make_gpt()
    soft_prompt(model, tokens)
    ids = random_ids(97, 3, 13, seed=2)
    prefixed = torch.cat([torch.tensor(tokens).expand(3, -1), ids], 1)
    with torch.no_grad():
        ours, wanted = logits(model, ids), logits(plain, prefixed)[:, 4:]
    assert torch.allclose(ours, wanted, atol=1e-5)
    batch, behind = model.pack(learned_from(ids, [6, 1, 1])), plain.pack(learned_from(prefixed, [10, 5, 5]))
    assert torch.allclose(model.loss(batch), plain.loss(behind), rtol=1e-6)
    assert generate(model, PROMPTS, 30) == generate(plain, [tokens + prompt for prompt in PROMPTS], 30)


def test_the_same_holds_in_bf16(make_gpt: Callable) -> None:
    """The cache holds the compute dtype; only rounding differs, so the first tokens agree."""
    model = make_gpt()
    model.set_compute_dtype(torch.bfloat16)
    together = generate(soft_prompt(model, [4, 4]), PROMPTS, 3)
    assert together == [generate(model, [prompt], 3)[0] for prompt in PROMPTS]


PROBABILITIES = [0.05, 0.3, 0.01, 0.4, 0.04, 0.2]


@pytest.mark.parametrize(
    "settings, wanted",
    [
        (dict(temperature=1.0), PROBABILITIES),
        (dict(temperature=0.5), [p**2 for p in PROBABILITIES]),
        (dict(temperature=2.0), [p**0.5 for p in PROBABILITIES]),
        (dict(temperature=1.0, top_k=1), [0, 0, 0, 1, 0, 0]),
        (dict(temperature=1.0, top_k=3), [0, 0.3, 0, 0.4, 0, 0.2]),
        (dict(temperature=1.0, top_k=99), PROBABILITIES),
        (dict(temperature=1.0, top_p=0.3), [0, 0, 0, 1, 0, 0]),
        (dict(temperature=1.0, top_p=0.5), [0, 0.3, 0, 0.4, 0, 0]),
        (dict(temperature=1.0, top_p=0.75), [0, 0.3, 0, 0.4, 0, 0.2]),
        (dict(temperature=1.0, top_p=1.0), PROBABILITIES),
        (dict(temperature=2.0, top_p=0.5), [0, 0.3**0.5, 0, 0.4**0.5, 0, 0]),  # after the temperature
        (dict(temperature=1.0, top_k=2, top_p=0.5), [0, 0, 0, 0.4, 0, 0]),  # 0.4 / 0.7 is enough already
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(settings: dict[str, float], wanted: list[float]) -> None:
    draws = 20_000
    logits = (torch.tensor(PROBABILITIES).log() + 3).expand(draws, -1)
    settings = {"top_k": None, "top_p": None} | settings
    tokens = next_tokens(logits, **settings, generator=torch.Generator().manual_seed(0))
    shares = tokens.bincount(minlength=len(wanted)) / draws
    expected = torch.tensor(wanted) / sum(wanted)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation).all(), shares


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.9, 0.0]])
    assert next_tokens(logits, 0, 1, 0.1, torch.Generator()).tolist() == [1, 0]


def test_a_seed_reproduces_and_another_differs(make_gpt: Callable) -> None:
    model = make_gpt()
    first, again, other = (generate(model, PROMPTS, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    torch.manual_seed(99)
    assert first == again == generate(model, PROMPTS, 20, temperature=1.0, seed=3)
    assert first != other
    assert generate(model, PROMPTS, 20, temperature=1.0, top_k=1) == generate(model, PROMPTS, 20)


def test_stop_ends_its_row_alone_and_is_left_out(make_gpt: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gpt()
    free = generate(model, PROMPTS, 30)
    stop = free[2][4]
    wanted = [new[: new.index(stop)] if stop in new else new for new in free]
    assert len(wanted[2]) < 30 and any(len(new) == 30 for new in wanted)
    assert generate(model, PROMPTS, 30, stop=stop) == wanted

    calls, following = [], model.next_hidden
    monkeypatch.setattr(model, "next_hidden", lambda *a: calls.append(1) or following(*a))
    assert generate(model, [PROMPTS[2]], 30, stop=stop) == [wanted[2]]
    assert len(calls) == len(wanted[2])  # nothing is computed once every row has stopped
    calls.clear()
    assert [len(new) for new in generate(model, PROMPTS, 1)] == [1] * len(PROMPTS)
    assert not calls


def test_context_limit(make_gpt: Callable) -> None:
    model = make_gpt()
    assert len(generate(model, [[1] * 90, [2]], 6)[0]) == 6
    with pytest.raises(UserError, match="90 prompt tokens [+] 7 new ones exceed the model's 96 positions"):
        generate(model, [[1] * 90, [2]], 7)
    soft_prompt(model, [1, 2])
    assert len(generate(model, [[1] * 90], 4)[0]) == 4
    with pytest.raises(UserError, match="2 reserved positions [+] 90 prompt tokens [+] 5"):
        generate(model, [[1] * 90], 5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=-1),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(temperature=float("nan")),
    ],
    ids=str,
)
def test_bad_settings_are_refused(make_gpt: Callable, settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="temperature must be 0 or more"):
        generate(make_gpt(), [[1]], 3, **settings)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e30])
def test_extreme_temperatures_stay_defined(make_gpt: Callable, temperature: float) -> None:
    model = make_gpt()
    new = generate(model, PROMPTS, 3, temperature=temperature)
    if temperature < 1:
        assert new == generate(model, PROMPTS, 3)


def test_an_empty_prompt_is_refused_and_no_prompt_is_no_text(make_gpt: Callable) -> None:
    model = make_gpt()
    with pytest.raises(UserError, match="an empty prompt"):
        generate(model, [[1], []], 3)
    assert generate(model, [], 3) == []


def test_the_training_state_comes_back(make_gpt: Callable) -> None:
    model = make_gpt()
    model.dropout = 0.5
    calm = generate(model, PROMPTS, 10)
    assert not model.training
    model.train()
    assert generate(model, PROMPTS, 10) == calm  # no dropout while generating
    assert model.training


def test_constant_parameters_end_with_the_text(make_gpt: Callable) -> None:
    """A layer may keep what it derives while text is generated, and not a moment longer: it trains again then."""
    model, calls = make_gpt(), []
    model.h[1].mlp.c_fc.set_constant = calls.append
    generate(model, PROMPTS, 3)
    assert calls == [True, False]
