"""The scores against the rouge-score package, transformers' loss, and plain loops."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minift.data.dataset import Example
from minift.data.pairs import Pair
from minift.errors import UserError
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.report import metrics

WORDS = (
    "the a cat dog Amanda baked cookies; will bring Jerry some tomorrow, don't can't it's 7pm U.S. a1b2 "
    "e-mail 3.14 #tag _x_ I'll ... ! na\u00efve \u00dcber caf\u00e9 "
    "\u4f60\u597d \U0001f600 \u0130stanbul \u2019s"
).split()
ODD = [
    "",
    " ",
    "...",
    "\n\n",
    "a",
    "A a A",
    "the the the the",
    "\u4f60\u597d",
    "a\u00a0b",
    "x\ty\nz",
    "\u017f \u212a",
]


def texts(count: int) -> list[tuple[str, str]]:
    """Pairs of texts that share much, little or nothing, in many lengths."""
    chance = random.Random(0)
    pairs = []
    for _ in range(count):
        reference = chance.choices(WORDS, k=chance.randrange(40))
        prediction = [w for w in reference if chance.random() < 0.7] + chance.choices(
            WORDS, k=chance.randrange(12)
        )
        if chance.random() < 0.3:
            chance.shuffle(prediction)
        pairs.append((" ".join(prediction), chance.choice([" ", "\n", "  ", "-"]).join(reference)))
    return pairs + [(a, b) for a in ODD for b in ODD]


def test_rouge_equals_the_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    nonzero = 0
    for prediction, reference in texts(200):
        wanted = {name: score.fmeasure for name, score in scorer.score(reference, prediction).items()}
        assert metrics.rouge(prediction, reference) == pytest.approx(wanted, abs=1e-12), (
            prediction,
            reference,
        )
        nonzero += wanted["rouge1"] > wanted["rougeL"] > wanted["rouge2"] > 0
    assert nonzero > 80


def test_longest_common_subsequence_of_long_texts() -> None:
    chance = random.Random(1)
    for size in (1, 63, 64, 65, 200):
        a, b = (chance.choices("abcde", k=size) for _ in range(2))
        table = [[0] * (size + 1) for _ in range(size + 1)]
        for i in range(size):
            for j in range(size):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
                )
        assert metrics.longest_common_subsequence(a, b) == table[-1][-1]


def test_texts_are_scored_row_by_row() -> None:
    scores = metrics.score_texts([" a b\n", "a c", ""], ["a b", "a d", "x"])
    assert scores.exact_match == pytest.approx(1 / 3)
    assert scores.rouge1 == scores.rougeL == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores.rouge2 == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        metrics.score_texts(["a"], ["a", "b"])


def some_examples(count: int = 13, vocabulary: int = 97) -> list[Example]:
    chance = random.Random(2)
    examples = []
    for i in range(count):
        ids = [chance.randrange(vocabulary) for _ in range(chance.randrange(3, 30))]
        examples.append(Example(ids, chance.randrange(1, len(ids)), Pair("p", "c", f"rows.jsonl:{i}")))
    return examples


@torch.no_grad()
def test_losses_equal_transformers_row_by_row(make_reference: Callable, from_reference: Callable) -> None:
    reference = make_reference()
    examples, loss, right, count = some_examples(), 0.0, 0, 0
    for example in examples:
        example.ids[-1] = reference(torch.tensor([example.ids])).logits[0, -2].argmax().item()  # one is right
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.n_prompt] = -100
        out = reference(ids, labels=labels)
        targets = ids[0, example.n_prompt :]
        loss += out.loss.item() * len(targets)
        right += (out.logits[0, example.n_prompt - 1 : -1].argmax(-1) == targets).sum().item()
        count += len(targets)
    found = [metrics.measure_losses(from_reference(reference), examples, batch) for batch in (1, 4, 100)]
    for losses in found:
        assert losses.loss == pytest.approx(loss / count, rel=1e-5)
        assert losses.perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert losses.token_accuracy == pytest.approx(right / count) and 0 < right < count


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
def speaker(make_gpt: Callable, tokenizer: Any) -> GPT:
    model = make_gpt(vocab_size=320, eos_token_id=0)
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_completions_keep_their_order(speaker: GPT, batch: int) -> None:
    examples = some_examples(vocabulary=320)
    wanted = []
    for example in examples:
        new = generate(speaker, [example.ids[: example.n_prompt]], 6, stop=0)[0]
        wanted.append(speaker.tokenizer.decode(new).strip())
    assert len(set(wanted)) > 3
    assert metrics.write_completions(speaker, examples, 6, batch) == wanted


def test_a_prompt_without_room_loses_its_beginning(speaker: GPT) -> None:
    speaker.prompt = torch.nn.Embedding(10, 24)
    ids = [i % 300 + 1 for i in range(96)]
    long = Example(ids, 95, Pair("p", "c", "rows.jsonl:1"))
    wanted = generate(speaker, [ids[95 - 66 : 95]], 20, stop=0)[
        0
    ]  # 96 positions - 10 of the prompt - 20 new ones
    assert metrics.write_completions(speaker, [long], 20, 1) == [speaker.tokenizer.decode(wanted).strip()]
    with pytest.raises(UserError, match="--max-new-tokens 86 leaves no room for a prompt"):
        metrics.write_completions(speaker, [long], 86, 1)


@torch.no_grad()
@pytest.mark.parametrize("soft", [0, 7])
def test_general_loss_equals_a_plain_loop(speaker: GPT, soft: int) -> None:
    text = "The landlord called after lunch, and the fridge is broken again. " * 9
    ids = speaker.tokenizer.encode(text).ids
    assert len(ids) % 48 > 1 and len(ids) > 3 * 48
    prefix = torch.empty(0, dtype=torch.long)
    if soft:
        prefix = torch.arange(3, 3 + soft)
    loss, count = 0.0, 0
    for start in range(0, len(ids), 48):  # half of 96 positions
        window = ids[start : start + 49]
        row = torch.cat([prefix, torch.tensor(window)])[None]
        scores = speaker.logits(speaker.hidden(row))[0, soft:].log_softmax(-1)
        for i, token in enumerate(window[1:]):
            loss -= scores[i, token].item()
            count += 1
    assert count == len(ids) - 1  # each token but the first is scored, once
    if soft:
        speaker.prompt = torch.nn.Embedding.from_pretrained(speaker.wte.weight[prefix].clone())
    for batch in (1, 3, 100):
        assert metrics.general_loss(speaker, text, batch) == pytest.approx(loss / count, rel=1e-5)
    for nothing in ("", "a"):
        with pytest.raises(UserError, match="fewer than two tokens"):
            metrics.general_loss(speaker, nothing, 2)


def test_general_loss_behind_a_long_soft_prompt(speaker: GPT) -> None:
    """A soft prompt of more than half the positions leaves less than a window, and must not end a run."""
    speaker.prompt = torch.nn.Embedding(60, 24)
    assert metrics.general_loss(speaker, "The landlord called after lunch. " * 20, 4) > 0


def test_all_scores_stand_under_their_names(speaker: GPT) -> None:
    examples = some_examples(5, vocabulary=320)
    scores = metrics.score(speaker, examples, 2, 4, "The fridge is broken")
    losses = metrics.measure_losses(speaker, examples, 100)
    assert scores["loss"] == pytest.approx(losses.loss) and scores["token_accuracy"] == losses.token_accuracy
    assert scores["general_loss"] == metrics.general_loss(speaker, "The fridge is broken", 2)
    assert set(scores) == {
        "loss",
        "perplexity",
        "token_accuracy",
        "exact_match",
        "rouge1",
        "rouge2",
        "rougeL",
        "general_loss",
        "completions",
    }
    assert scores["completions"] == metrics.write_completions(speaker, examples, 4, 2)
    assert metrics.score(speaker, examples, 2, 4, None)["general_loss"] is None
