"""eval.py --shots: the tokens of rows by an independent construction, their losses by transformers, and the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import QUICK, evaluate, json_of, trained, write_pairs

from minift.data import dataset
from minift.data.dataset import DataOptions
from minift.data.pairs import Pair
from minift.data.tokens import Example
from minift.errors import UserError
from minift.files import weights
from minift.files.weights import Base
from minift.model.generate import generate
from minift.report import metrics, shots
from minift.report.rouge import rouge

pytestmark = pytest.mark.usefixtures("quick")
PLAIN = ["--dtype", "fp32", "--device", "cpu", "--batch", "4", "--max-new-tokens", "6"]
EOS = 0


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("shots") / "pairs")


@pytest.fixture(scope="module")
def base(model_folder: Path) -> Base:
    return weights.load(str(model_folder))


@pytest.fixture(scope="module")
def rows(base: Base, pairs: Path) -> dict[str, list[Example]]:
    return dataset.load_examples(DataOptions(str(pairs)), 0, base.tokenizer, EOS, 96, {"train": None, "test": 5})[0]


def split_rows(ids: list[int], end: int) -> list[list[int]]:
    """Tokens cut after each `end`."""
    parts: list[list[int]] = [[]]
    for token in ids:
        parts[-1].append(token)
        if token == end:
            parts.append([])
    assert parts.pop() == []
    return parts


def lines(pairs: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (pairs / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ending", ["end-of-text", "line ends"])
def test_rows_are_training_rows_then_the_test_row(base: Base, pairs: Path, rows: Any, ending: str) -> None:
    """Each row, cut at its ends, against the tokens of the files' texts, tokenized here."""
    encode = base.tokenizer.encode
    (line_end,) = encode("\n").ids
    end = {"end-of-text": EOS, "line ends": line_end}[ending]

    def tokens(fields: dict[str, str]) -> tuple[list[int], list[int]]:
        return encode(fields["prompt"]).ids, [*encode(f" {fields['completion']}").ids, end]

    train = [sum(tokens(fields), []) for fields in lines(pairs, "train")]
    ways = shots.find_ways(base, base.model, rows, 3, 6)
    way = {way.name: way for way in ways}[f"base, 3 shots, {ending}"]
    assert [way.name for way in ways] == ["base", "base, 3 shots, end-of-text", "base, 3 shots, line ends", "tuned"]
    assert way.end == end and len(way.rows) == 5
    for fields, example, count in zip(lines(pairs, "test"), way.rows, way.shots, strict=False):
        *before, last = split_rows(example.ids, end)
        prompt, completion = tokens(fields)
        assert last == prompt + completion and example.prompt == sum(before, []) + prompt
        (span,) = example.spans
        assert example.ids[slice(*span)] == completion and span[1] == len(example.ids)
        assert len(before) == count and all(row in train for row in before)
        assert len(example.prompt) + 6 <= 96 and len(example.ids) <= 96
    assert max(way.shots) == 3 and len({tuple(example.ids[:5]) for example in way.rows}) > 2  # not the same for all
    zero = ways[0]
    assert [example.ids for example in zero.rows] == [row.ids for row in rows["test"]] and not any(zero.shots)


def test_as_many_shots_as_fit() -> None:
    train = []
    for i, length in enumerate((5, 50, 6, 4, 7), 1):
        train.append(Example([i] * (length - 1) + [0], ((1, length),), Pair("p", "c", "")))
    test = Example([9, 9, 8, 0], ((2, 4),), Pair("p", "c", "test"))
    for room in (0, 3, 4, 10, 22, 71, 72):
        example, count = shots.put_shots(test, train, 5, room, 0, seed=1)
        added = len(example.ids) - 4
        used = {token for token in example.ids[:added] if token}
        assert added <= room and len(used) == count and example.ids[added:] == test.ids
        assert example.spans == ((added + 2, added + 4),)
        left = [len(row.ids) for row in train if row.ids[0] not in used]
        assert all(length > room - added for length in left)  # no other one fits
    assert shots.put_shots(test, train, 2, 100, 0, seed=1)[1] == 2
    assert shots.put_shots(test, train, 9, 100, 0, seed=1)[1] == 5
    assert len({tuple(shots.put_shots(test, train, 2, 100, 0, seed)[0].ids) for seed in range(9)}) > 3


def test_soft_prompt_positions_are_respected(base: Base, rows: Any) -> None:
    model = base.model.shared_copy()
    model.prompt_tokens = 20
    row = rows["test"][0]
    assert shots.shot_room(base.model, row, 6) - shots.shot_room(model, row, 6) == 20
    assert shots.shot_room(base.model, row, 6) == 96 - max(len(row.ids), len(row.prompt) + 6)
    long = Example([7] * 90 + [0], ((89, 91),), row.pair)
    way = shots.Way("tuned", model, [long], EOS, [0])
    assert len(shots.request(way, 0, 6)) == 96 - 20 - 6


def test_line_ends_inside_completions_are_no_ends(base: Base, rows: Any) -> None:
    (line_end,) = base.tokenizer.encode("\n").ids
    assert shots.line_end(base, rows["test"]) == line_end
    inside = Example([5, 6, line_end, 7, EOS], ((2, 5),), Pair("p", "c", ""))
    in_prompt = Example([5, line_end, 6, 7, EOS], ((3, 5),), Pair("p", "c", ""))
    assert shots.line_end(base, [in_prompt]) == line_end and shots.line_end(base, [inside]) is None
    ways = shots.find_ways(base, base.model, {"train": rows["train"], "test": [inside, inside]}, 2, 6)
    assert [way.name for way in ways] == ["base", "base, 2 shots, end-of-text", "tuned"]


def test_texts_alone_and_one_row_are_refused(base: Base, rows: Any) -> None:
    alone = Example([5, 6, 0], ((1, 3),), Pair("", "c", ""))
    with pytest.raises(UserError, match="prompt and a completion"):
        shots.find_ways(base, base.model, {"train": rows["train"], "test": [alone, alone]}, 2, 6)
    with pytest.raises(UserError, match="two test rows"):
        shots.find_ways(base, base.model, {"train": rows["train"], "test": rows["test"][:1]}, 2, 6)


def test_ways_take_turns(base: Base, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model answers a request before the next one; each stops at the end of its own rows."""
    ways = shots.find_ways(base, base.model, rows, 2, 6)
    calls = []

    def recording(model: Any, prompts: list[list[int]], new_tokens: int, stop: int) -> Any:
        calls.append((prompts[0], stop))
        return generate(model, prompts, new_tokens, stop=stop)

    monkeypatch.setattr(shots, "generate", recording)
    seconds = shots.time_in_turn(ways, 6)
    assert {name: len(times) for name, times in seconds.items()} == {way.name: 5 for way in ways}
    assert len(calls) == 6 * 4
    asked = set()
    for number in range(6):
        some = calls[4 * number : 4 * number + 4]
        (i,) = [i for i, row in enumerate(rows["test"]) if (row.prompt, EOS) in some]
        assert sorted(some) == sorted((way.rows[i].prompt, way.end) for way in ways)
        asked.add(i)
    assert asked == set(range(5)) and calls[:4] != calls[4:8]


CHANGES = [
    ({"rougeL": 0.2, "rougeL_interval": (0.1, 0.3), "prompt_tokens_ratio": 0.5}, True),
    ({"rougeL": 0.2, "rougeL_interval": (-0.1, 0.3), "prompt_tokens_ratio": 0.5}, False),
    ({"rougeL": 0.2, "rougeL_interval": (0.1, 0.3), "prompt_tokens_ratio": 1.5}, False),
    ({"loss": -0.2, "loss_interval": (-0.3, -0.1), "prompt_tokens_ratio": 0.5}, True),
    ({"loss": 0.2, "loss_interval": (0.1, 0.3), "prompt_tokens_ratio": 0.5}, False),
]


@pytest.mark.parametrize("change, expected", CHANGES)
def test_better_results_with_fewer_tokens(change: dict[str, Any], expected: bool) -> None:
    assert shots.is_better(change) == expected


@torch.no_grad()
def reference_loss(model: torch.nn.Module, examples: list[Example]) -> float:
    """Nats per target token by transformers."""
    total = count = 0.0
    for example in examples:
        begin, end = example.spans[0]
        labels = torch.tensor([example.ids])
        labels[:, :begin] = -100
        total += model(torch.tensor([example.ids]), labels=labels).loss.item() * (end - begin)
        count += end - begin
    return total / count


def test_command(model_folder: Path, base: Base, pairs: Path, tmp_path: Path) -> None:
    """A run with a soft prompt: the figures of its base by transformers and by hand, and the run's result.json."""
    from transformers import GPT2LMHeadModel

    trained("--model", model_folder, "--data", pairs, *QUICK, "--mode", "prompt", "--prompt-tokens", 3, "--steps", 2,
            "--out", tmp_path / "run")
    old = json_of(tmp_path / "run" / "result.json")
    ended = evaluate(tmp_path / "run", "--shots", 3, "--json", "--test-rows", 5, *PLAIN)
    assert ended.code == 0 and ended.err == ""
    result = json.loads(ended.out)["shots"]
    assert json_of(tmp_path / "run" / "result.json") == old | {"shots": result}

    limits = {"train": None, "test": 5}
    rows, *_ = dataset.load_examples(DataOptions(str(pairs)), 0, base.tokenizer, EOS, 96 - 3, limits)
    ways = shots.find_ways(base, base.model, rows, 3, 6)
    model = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    assert list(result["models"]) == [way.name for way in ways]
    for way in ways[:3]:
        figures = result["models"][way.name]
        assert figures["fitted"] == np.mean(way.shots) and figures["rows_with_all"] == way.shots.count(3)
        assert figures["loss"] == pytest.approx(reference_loss(model, way.rows), rel=1e-5)
        assert figures["prompt_tokens"] == np.mean([len(row.prompt) for row in way.rows])
        texts, _ = metrics.write_completions(base.model, base.tokenizer, way.end, way.rows, 6)
        values = [rouge(text, row.pair.completion)["rougeL"] for text, row in zip(texts, way.rows, strict=True)]
        assert figures["rougeL"] == pytest.approx(np.mean(values))
        low, high = figures["loss_interval"]
        assert low < figures["loss"] < high
    tuned = result["models"]["tuned"]
    assert tuned["prompt_tokens"] == result["models"]["base"]["prompt_tokens"] + 3 and tuned["fitted"] == 0
    for name, change in result["differences"].items():
        figures = result["models"][name]
        assert change["loss"] == pytest.approx(tuned["loss"] - figures["loss"])
        assert change["seconds_ratio"] == pytest.approx(tuned["seconds"] / figures["seconds"])
    assert result["shots"] == 3 and result["rougeL"] == max(result["models"][name]["rougeL"] for name in
                                                           result["differences"])  # fmt: skip
    text = shots.report(result)
    assert "not tried with line ends" not in text
    one = result | {"differences": {result["best"]: result["differences"][result["best"]]}}
    assert "not tried with line ends" in shots.report(one)
    assert "5 test rows" in text and text.count("\n| base, 3 shots") == 2
    assert text.splitlines()[-1].startswith("better results with fewer tokens:")
