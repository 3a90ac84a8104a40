"""eval.py --latency: the models, the requests and the figures. No test depends on the speed of anything."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import MODES, QUICK, evaluate, json_of, trained, write_pairs

from minift import modes
from minift.data.pairs import Pair
from minift.data.tokens import Example
from minift.errors import UserError
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.model.packing import text_row
from minift.report import latency

pytestmark = pytest.mark.usefixtures("quick")
PLAIN = ["--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "3"]


def tuned_copy(base: GPT, mode: str) -> GPT:
    """A model of the mode on the base's weights, with random values in all parameters that train."""
    model = base.shared_copy()
    modes.apply(model, mode, modes.MODES[mode].Options(**MODES[mode].options))
    generator = torch.Generator().manual_seed(1)
    for parameter in modes.tuned_parameters(model).values():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: GPT) -> torch.Tensor:
    batch = model.pack([text_row([5, 9, 2, 30, 7, 1]), text_row([8, 8, 3])])
    return model.logits(model.hidden(batch, batch.target_positions))


def some_examples(count: int) -> list[Example]:
    rows = []
    for i in range(count):
        ids = [1 + i, *range(2, 4 + 3 * i), 90]
        rows.append(Example(ids, ((len(ids) - 1, len(ids)),), Pair("p", "c", f"rows:{i}")))
    return rows


@pytest.mark.parametrize("mode", MODES)
def test_models_compute_as_those_of_the_run(make_gpt: Callable[..., GPT], mode: str) -> None:
    """Merged equals tuned and is another computation; base and tuned stay as they were, bit for bit."""
    base = make_gpt()
    tuned = tuned_copy(base, mode)
    before = copy.deepcopy([base.state_dict(), tuned.state_dict()])
    models = latency.models_to_time(base, tuned, mode)
    assert list(models) == ["base", "tuned", *(["merged"] if mode == "lora" else [])]
    assert torch.equal(logits(models["base"]), logits(base)) and torch.equal(logits(models["tuned"]), logits(tuned))
    assert (logits(base) - logits(tuned)).abs().max() > 0.01
    if mode == "lora":
        assert (logits(models["merged"]) - logits(tuned)).abs().max() < 1e-4
        name = "h.0.attn.c_attn"
        assert not torch.equal(models["merged"].get_submodule(name).weight, base.get_submodule(name).weight)
        plain = GPT(base.config)  # without the update, GPT-2's weights alone give the tuned model
        kept = {key: value for key, value in models["merged"].state_dict().items() if "lora" not in key}
        plain.load_state_dict(kept)
        assert (logits(plain.eval()) - logits(tuned)).abs().max() < 1e-4
    for model, state in zip((base, tuned), before, strict=True):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_weights_are_in_the_compute_dtype(make_gpt: Callable[..., GPT]) -> None:
    base = make_gpt()
    base.set_compute_dtype(torch.bfloat16)
    for mode in ("full", "lora", "adapter"):
        tuned = base.shared_copy()
        modes.apply(tuned, mode, modes.MODES[mode].Options(**MODES[mode].options))
        tuned.set_compute_dtype(torch.bfloat16)
        for model in latency.models_to_time(base, tuned, mode).values():
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in modes.tuned_parameters(tuned).values()} == {torch.float32}


def test_requests(make_gpt: Callable[..., GPT]) -> None:
    """16 different rows and the one of median length; long prompts lose their beginning, few rows repeat."""
    rows = some_examples(20)
    requests = latency.choose_prompts(rows, 90)
    assert list(requests) == [1, 16] and requests == latency.choose_prompts(rows, 90)
    assert len({prompt[0] for prompt in requests[16]}) == 16
    lengths = sorted(len(prompt) for prompt in requests[16])
    assert [len(prompt) for prompt in requests[1]] == [lengths[8]]
    for short, long in zip(latency.choose_prompts(rows, 7)[16], requests[16], strict=True):
        assert short == long[-7:]
    assert len(latency.choose_prompts(rows[:3], 90)[16]) == 16


def test_models_take_turns_and_write_equally_many_tokens(
    make_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_gpt()
    models = {name: base.shared_copy() for name in "abc"}
    calls = []

    def recording(model: GPT, prompts: list[list[int]], new_tokens: int, **options: Any) -> Any:
        assert options.get("stop") is None  # no token ends a row
        new = generate(model, prompts, new_tokens, **options)
        name = next(name for name, known in models.items() if known is model)
        calls.append((name, {len(ids) for ids in new}, len(new)))
        return new

    monkeypatch.setattr(latency, "generate", recording)
    times = latency.time_in_turn(models, [[5], [5, 7]], 4)
    assert {name: len(pairs) for name, pairs in times.items()} == dict.fromkeys("abc", latency.ROUNDS)
    rounds = [calls[i : i + 6] for i in range(0, len(calls), 6)]
    assert len(rounds) == latency.ROUNDS + 1  # one round is a warm-up
    for round in rounds:
        assert [(lengths, count) for _, lengths, count in round] == [({1}, 2), ({4}, 2)] * 3
        assert sorted(name for name, _, _ in round[::2]) == ["a", "b", "c"]
    starts = [round[0][0] for round in rounds[1:]]
    assert [starts.count(name) for name in "abc"] == [3, 3, 3]


def test_noise_that_all_models_share_cancels() -> None:
    """The machine is ten times slower in some rounds; the tuned model always takes 1.5 times the base's time."""
    speeds = [1, 10, 1, 1, 4, 1, 2, 1, 1]
    times = {"base": [(0.01 * s, 0.05 * s) for s in speeds], "tuned": [(0.02 * s, 0.08 * s) for s in speeds]}
    figures = latency.summarise(times, 16, 5)

    def values(model: str, name: str) -> tuple[float, float, float]:
        return latency.median_and_interval(figures[model], name)

    assert values("base", "ms_per_token") == pytest.approx((10, 10, 40))
    assert values("tuned", "ms_per_token") == pytest.approx((15, 15, 60))
    assert values("tuned", "first_token_ms") == pytest.approx((20, 20, 80))
    assert values("tuned", "first_token_ratio") == pytest.approx((2, 2, 2))
    assert values("tuned", "ms_per_token_ratio") == pytest.approx((1.5, 1.5, 1.5))
    assert values("base", "ms_per_token_ratio") == (1, 1, 1)
    assert values("base", "tokens_per_second") == pytest.approx((1600, 400, 1600))


def test_the_interval_of_a_median() -> None:
    """Its level by counting: the median lies outside if at most one of nine values is on one side of it."""
    outside = sum(sum(signs) in (0, 1, 8, 9) for signs in itertools.product((0, 1), repeat=latency.ROUNDS))
    assert round(1 - outside / 2**latency.ROUNDS, 2) == latency.INTERVAL
    assert latency.median_interval("x", [5, 1, 9, 2, 8, 3, 7, 4, 6]) == {"x": 5, "x_interval": [2, 8]}


TABLE1 = [
    # models and their ratios, added layers, a soft prompt -> the words of the sentence
    ({"tuned": [1.6, 1.5, 1.7], "merged": [1.01, 0.99, 1.03]}, True, False, "came out: merged takes 1.01"),
    ({"tuned": [1.6, 1.5, 1.7], "merged": [1.3, 1.2, 1.4]}, True, False, "did not come out: merged"),
    ({"tuned": [1.6, 1.5, 1.7], "merged": [1.0, 0.9, 1.3]}, True, False, "is undecided"),
    ({"tuned": [1.2, 1.15, 1.3]}, True, False, "came out: tuned takes 1.20 [1.15, 1.30]"),
    ({"tuned": [1.0, 0.9, 1.05]}, True, False, "did not come out: tuned"),
    ({"tuned": [1.0, 0.9, 1.05]}, False, False, "came out: tuned"),
    ({"tuned": [1.2, 1.1, 1.3]}, True, True, "no soft prompts"),
]


@pytest.mark.parametrize("ratios, adds_layers, has_prompt, words", TABLE1)
def test_table1(ratios: dict[str, list[float]], adds_layers: bool, has_prompt: bool, words: str) -> None:
    sentence = latency.table1({"base": (1, 1, 1)} | ratios, adds_layers, has_prompt)
    assert words in sentence and ("did not" in words or "did not" not in sentence)


def test_added_layers(make_gpt: Callable[..., GPT]) -> None:
    added = {mode: latency.adds_layers(tuned_copy(make_gpt(), mode)) for mode in MODES}
    assert added == {"full": False, "selective": False, "lora": True, "prompt": True, "adapter": True}


@pytest.mark.parametrize("new_tokens, words", [(1, "2 or more"), (96, "leaves no room")])
def test_wrong_limits(make_gpt: Callable[..., GPT], new_tokens: int, words: str) -> None:
    base = make_gpt()
    with pytest.raises(UserError, match=words):
        latency.measure(base, base, "full", some_examples(3), new_tokens)


def test_command(model_folder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    trained("--model", model_folder, "--data", pairs, *QUICK, "--steps", 2, "--out", tmp_path / "run")
    old = json_of(tmp_path / "run" / "result.json")
    ended = evaluate(tmp_path / "run", "--latency", "--json", *PLAIN)
    assert ended.code == 0 and ended.err == ""
    result = json.loads(ended.out)["latency"]
    assert json_of(tmp_path / "run" / "result.json") == old | {"latency": result}
    assert list(result) == ["base", "tuned", "merged", "settings", "table1"]
    for name in ("base", "tuned", "merged"):
        assert list(result[name]) == ["1", "16"]
        for figures in result[name].values():
            for key in ("first_token_ms", "ms_per_token", "tokens_per_second", "ms_per_token_ratio"):
                low, high = figures[f"{key}_interval"]
                assert low <= figures[key] <= high
    assert result["settings"]["new_tokens"] == 3 and result["settings"]["dtype"] == "float32"
    text = latency.report(result)
    assert text.count("\n| merged ") == 2 and text.endswith(result["table1"]) and "Hu et al. 2021" in text
