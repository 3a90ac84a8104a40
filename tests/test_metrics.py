"""The scores against transformers' loss and plain loops; test_rouge.py has ROUGE's."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minift import distributed
from minift.data.pairs import Pair
from minift.data.tokens import Example
from minift.errors import UserError
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.report import metrics

EOS = 0


def some_examples(count: int = 13, vocabulary: int = 97) -> list[Example]:
    chance = random.Random(2)
    examples = []
    for i in range(count):
        ids = [chance.randrange(vocabulary) for _ in range(chance.randrange(3, 30))]
        spans = ((chance.randrange(1, len(ids)), len(ids)),)
        examples.append(Example(ids, spans, Pair("p", "c", f"rows.jsonl:{i}")))
    return examples


def scored_rows(*texts: tuple[str, str, str]) -> list[dict[str, Any]]:
    """The rows of (prompt, reference, completion)."""
    rows = []
    for i, (prompt, reference, completion) in enumerate(texts):
        example = Example([5, 6, 7, EOS], ((2, 4),), Pair(prompt, reference, f"rows.jsonl:{i}"))
        rows.append(metrics.score_row(example, completion, 1.5, set()))
    return rows


def test_texts_are_scored_row_by_row() -> None:
    rows = scored_rows(("p", "a b", " a b\n"), ("p", "a d", "a c"), ("p", "x", ""))
    assert [row["exact_match"] for row in rows] == [1, 0, 0] and [row["rougeL"] for row in rows] == [1, 0.5, 0]
    assert rows[1] == {"where": "rows.jsonl:1", "loss": 1.5, "targets": 2, "completion": "a c", "exact_match": 0,
                       "rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5, "names": 0, "unsupported": 0,
                       "unsupported_words": []}
    scores = metrics.text_scores(rows)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores["rouge2"] == pytest.approx(1 / 3) and scores["unsupported"] is None


def test_unsupported_is_the_share_of_all_names_and_numbers() -> None:
    rows = scored_rows(("Hi Anna", "at 7", "see Anna and Ben at 7 or 8"), ("Hi Eve", "no", "no"), ("", "text 9", ""),
                       ("Hi Tom", "no", "see Tim"))
    assert [(row["names"], row["unsupported"]) for row in rows] == [(4, 2), (0, 0), (0, 0), (1, 1)]
    assert metrics.text_scores(rows)["unsupported"] == 3 / 5


def test_references_without_words_have_no_rouge(speaker: GPT, tokenizer: Any) -> None:
    examples = [replace(example, pair=Pair("p", ":-)", "x")) for example in some_examples(3, vocabulary=320)]
    scores = metrics.score(speaker, tokenizer, EOS, examples, 2, 4, None)
    assert scores["rouge1"] is scores["rougeL"] is scores["rows"][0]["rougeL"] is None
    assert scores["exact_match"] == scores["rows"][0]["exact_match"] == 0
    examples[1] = replace(examples[1], pair=Pair("p", "a", "x"))
    assert metrics.score(speaker, tokenizer, EOS, examples, 2, 4, None)["rougeL"] is not None  # as rouge-score


@torch.no_grad()
def test_losses_equal_transformers_row_by_row(make_reference: Callable, from_reference: Callable) -> None:
    reference = make_reference()
    examples, by_row, right, count = some_examples(), [], 0, 0
    for example in examples:
        begin = example.spans[0][0]
        example.ids[-1] = reference(torch.tensor([example.ids])).logits[0, -2].argmax().item()  # one is right
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, :begin] = -100
        out = reference(ids, labels=labels)
        targets = ids[0, begin:]
        by_row.append(out.loss.item() * len(targets))
        right += (out.logits[0, begin - 1 : -1].argmax(-1) == targets).sum().item()
        count += len(targets)
    found = [metrics.measure_losses(from_reference(reference), examples, batch) for batch in (1, 4, 100)]
    loss = sum(by_row)
    for losses in found:
        assert losses["row_losses"] == pytest.approx(by_row, rel=1e-5)
        assert losses["loss"] == pytest.approx(loss / count, rel=1e-5)
        assert losses["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert losses["token_accuracy"] == pytest.approx(right / count) and 0 < right < count


def test_processes_share_the_rows(make_gpt: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four processes adds its part of the sums; it has none of the rows in a batch of three."""
    examples, model = some_examples(), make_gpt()
    alone = metrics.measure_losses(model, examples, 5)
    parts: list[tuple[float, ...]] = []
    monkeypatch.setattr(metrics, "all_sum", lambda *values: parts.append(values) or list(values))
    for rank in range(4):
        for module in (metrics, distributed):
            monkeypatch.setattr(module, "RANK", rank)
            monkeypatch.setattr(module, "WORLD_SIZE", 4)
        metrics.measure_losses(model, examples, 5)
    loss, _, count, *row_losses = map(sum, zip(*parts, strict=True))
    assert row_losses == pytest.approx(alone["row_losses"], rel=1e-5)
    assert loss / count == pytest.approx(alone["loss"], rel=1e-5)
    assert all(0 in part for part in parts)  # nobody has the rows of the others


@torch.no_grad()
def test_each_span_of_a_row_counts(make_gpt: Callable) -> None:
    model = make_gpt()
    ids = some_examples(1)[0].ids + list(range(20))
    both = Example(ids, ((2, 5), (9, 14)), Pair("p", "c", "rows.jsonl:1"))
    logits = model.logits(model.hidden(model.pack([both])))  # (N, V)
    scores = logits.log_softmax(-1)
    expected = [-scores[i - 1, ids[i]].item() for i in [*range(2, 5), *range(9, 14)]]
    found = metrics.measure_losses(model, [both], 1)
    assert found["loss"] == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert found["row_losses"] == pytest.approx([sum(expected)], rel=1e-5)


def test_measuring_leaves_the_model_as_it_was(make_gpt: Callable) -> None:
    model = make_gpt()
    model.dropout = 0.5
    calm = metrics.measure_losses(model, some_examples(), 4)
    assert not model.training
    model.train()
    assert metrics.measure_losses(model, some_examples(), 4) == calm
    assert model.training and all(p.grad is None for p in model.parameters())


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert metrics.safe_exp(1.5) == math.exp(1.5)
    assert metrics.safe_exp(1e4) == math.inf


@pytest.fixture
def speaker(make_gpt: Callable) -> GPT:
    return make_gpt(vocab_size=320, eos_token_id=EOS)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_completions_keep_their_order(speaker: GPT, tokenizer: Any, batch: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DECODE_BATCH", batch)
    examples = some_examples(vocabulary=320)
    wanted = []
    for example in examples:
        new = generate(speaker, [example.ids[: example.spans[0][0]]], 6, stop=EOS)[0]
        wanted.append(tokenizer.decode(new).strip())
    assert len(set(wanted)) > 3
    assert metrics.write_completions(speaker, tokenizer, EOS, examples, 6)[0] == wanted


def set_soft_prompt(model: GPT, weight: torch.Tensor) -> None:
    model.prompt = torch.nn.Embedding.from_pretrained(weight)
    model.prompt_tokens = len(weight)


def test_a_prompt_without_room_loses_its_beginning(speaker: GPT, tokenizer: Any) -> None:
    set_soft_prompt(speaker, torch.randn(10, 24))
    ids = [i % 300 + 1 for i in range(96)]
    long = Example(ids, ((95, 96),), Pair("p", "c", "rows.jsonl:1"))
    # 96 positions - 10 of the prompt - 20 new ones
    expected = generate(speaker, [ids[95 - 66 : 95]], 20, stop=EOS)[0]
    texts, counts = metrics.write_completions(speaker, tokenizer, EOS, [long], 20)
    assert texts == [tokenizer.decode(expected).strip()] and counts["prompts_shortened"] == 1
    with pytest.raises(UserError, match="--max-new-tokens 86 leaves no room for a prompt"):
        metrics.write_completions(speaker, tokenizer, EOS, [long], 86)


def test_rows_of_text_alone_are_not_completed(speaker: GPT, tokenizer: Any) -> None:
    text = Example([5, 6, 7, EOS], ((1, 4),), Pair("", "text", "rows.jsonl:1"))
    pair = Example([5, 6, 7, EOS], ((1, 4),), Pair("p", "c", "rows.jsonl:2"))
    alone = metrics.score(speaker, tokenizer, EOS, [text], 2, 4, None)
    assert alone["exact_match"] is alone["rougeL"] is None and alone["completions"] == [""] and alone["loss"] > 0
    both = metrics.score(speaker, tokenizer, EOS, [text, pair], 2, 4, None)
    one = metrics.score(speaker, tokenizer, EOS, [pair], 2, 4, None)
    assert both["completions"] == ["", *one["completions"]] and both["rougeL"] == one["rougeL"]


def test_what_a_limit_cut_is_counted_and_said(speaker: GPT, tokenizer: Any,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("p", "c", "rows.jsonl:1")
    fits = Example([5, 6, 7, 8, EOS], ((2, 5),), pair)  # the completion has two tokens and end-of-text
    at_limit = replace(fits, ids=[5, 6, 7, 8, 9, EOS], spans=((2, 6),))
    over = replace(fits, ids=[5, 6, 7, 8, 9, 10, EOS], spans=((2, 7),))
    unended = replace(fits, ids=[5, 6, 7, 8, 9, 10], spans=((2, 6),))  # cut before its end-of-text
    long_prompt = replace(fits, ids=[5] * 94 + [7, EOS], spans=((94, 96),))  # 96 - 3 positions are left
    rows = [fits, at_limit, over, unended, long_prompt]
    written = {1: [7], 2: [7, 8, 9], 93: [7, 8, 9]}  # by the length of the prompt
    rows[0] = replace(fits, ids=fits.ids[1:], spans=((1, 4),))
    monkeypatch.setattr(metrics, "generate",
                        lambda model, prompts, limit, stop: [written[len(prompt)] for prompt in prompts])
    scores = metrics.score(speaker, tokenizer, EOS, rows, 2, 3, None)
    counts = {name: scores[name] for name in
              ("completions_at_limit", "references_over_limit", "prompts_shortened")}
    assert counts == {"completions_at_limit": 4, "references_over_limit": 2, "prompts_shortened": 1}
    lines = metrics.limit_report(scores, 3)
    assert len(lines) == 3 and lines[0].startswith("4 of 5 completions were cut")
    assert "2 of 5 references are longer" in lines[1] and "1 of 5 prompts were shortened" in lines[2]
    assert metrics.limit_report(scores | dict.fromkeys(counts, 0), 3) == []


@torch.no_grad()
@pytest.mark.parametrize("soft", [0, 7])
def test_the_loss_of_a_text_equals_a_plain_loop(speaker: GPT, tokenizer: Any, soft: int) -> None:
    ids = tokenizer.encode("The landlord called after lunch, and the fridge is broken again. " * 9).ids
    assert len(ids) % 48 > 1 and len(ids) > 3 * 48
    prefix = list(range(3, 3 + soft))
    loss, count = 0.0, 0
    for start in range(0, len(ids), 48):  # half of 96 positions
        window = ids[start : start + 49]
        states = speaker.hidden(speaker.pack([metrics.text_row([*prefix, *window, EOS])]))
        scores = speaker.logits(states)[soft:].log_softmax(-1)
        for i, token in enumerate(window[1:]):
            loss -= scores[i, token].item()
            count += 1
    assert count == len(ids) - 1  # each token but the first is scored, once
    if soft:
        set_soft_prompt(speaker, speaker.wte.weight[prefix].clone())
    rows = metrics.text_windows(ids, 96, soft)
    assert rows == metrics.text_windows(ids, 96, 0)  # base and tuned model read the same
    for batch in (1, 3, 100):
        assert metrics.measure_losses(speaker, rows, batch)["loss"] == pytest.approx(loss / count, rel=1e-5)


def test_a_file_of_general_text(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>"])  # a text has it between its documents
    file = tmp_path / "general.txt"
    file.write_text("The fridge is broken. <|endoftext|>" * 9, encoding="utf-8")
    ids = tokenizer.encode("The fridge is broken. <|endoftext|>" * 9).ids
    rows = metrics.load_general_rows(file, tokenizer, 96, 0)
    assert rows == metrics.text_windows(ids, 96, 0) and len(rows) > 1 and rows[0].ids.count(EOS) > 1
    for nothing in ("", "a"):
        file.write_text(nothing, encoding="utf-8")
        with pytest.raises(UserError, match="general.txt has fewer than two tokens"):
            metrics.load_general_rows(file, tokenizer, 96, 0)


def test_the_loss_of_a_text_behind_a_long_soft_prompt(speaker: GPT, tokenizer: Any) -> None:
    """A soft prompt of more than half the positions leaves less than a window, and must not end a run."""
    set_soft_prompt(speaker, torch.randn(60, 24))
    ids = tokenizer.encode("The landlord called after lunch. " * 20).ids
    rows = metrics.text_windows(ids, 96, 60)
    assert max(len(row.ids) for row in rows) == 37
    assert metrics.measure_losses(speaker, rows, 4)["loss"] > 0


def test_all_scores_stand_under_their_names(speaker: GPT, tokenizer: Any) -> None:
    examples = some_examples(5, vocabulary=320)
    general_rows = metrics.text_windows(tokenizer.encode("The fridge is broken").ids, 96, 0)
    scores = metrics.score(speaker, tokenizer, EOS, examples, 2, 4, general_rows)
    losses = metrics.measure_losses(speaker, examples, 100)
    assert scores["loss"] == pytest.approx(losses["loss"])
    assert scores["token_accuracy"] == losses["token_accuracy"]
    assert scores["general_loss"] == metrics.measure_losses(speaker, general_rows, 2)["loss"]
    assert set(scores) == {
        "loss", "perplexity", "token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL", "general_loss",
        "unsupported", "completions", "rows", "completions_at_limit", "prompts_shortened", "references_over_limit",
    }
    rows = scores["rows"]
    assert [row["where"] for row in rows] == [example.pair.where for example in examples]
    assert [row["completion"] for row in rows] == scores["completions"]
    assert [row["targets"] for row in rows] == [example.num_targets for example in examples]
    assert [row["loss"] for row in rows] == pytest.approx(losses["row_losses"])
    assert scores["loss"] == pytest.approx(sum(row["loss"] for row in rows) / sum(row["targets"] for row in rows))
    assert scores["rougeL"] == sum(row["rougeL"] for row in rows) / len(rows)
    completions, counts = metrics.write_completions(speaker, tokenizer, EOS, examples, 4)
    assert scores["completions"] == completions and scores.items() >= counts.items()
    assert metrics.score(speaker, tokenizer, EOS, examples, 2, 4, None)["general_loss"] is None
