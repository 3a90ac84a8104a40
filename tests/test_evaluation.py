"""The scores of base and tuned model side by side: intervals, differences, and rows with unsupported content."""

import random
from typing import Any

import pytest

from minift.data.pairs import Pair
from minift.data.tokens import Example
from minift.report import evaluation, metrics


def make_scores(losses: list[float], completions: list[str]) -> dict[str, Any]:
    """The scores of a model on rows with these losses and completions, four targets each."""
    rows = []
    for i, (loss, completion) in enumerate(zip(losses, completions, strict=True)):
        example = Example([5, 6, 7, 8, 9], ((1, 5),), Pair("Anna: Hi, Ben", "Anna says hi.", f"rows.jsonl:{i}"))
        rows.append(metrics.score_row(example, completion, loss, {"he"}))
    counts = dict.fromkeys(("completions_at_limit", "references_over_limit", "prompts_shortened"), 0)
    return {"loss": sum(losses) / 4 / len(losses), "perplexity": 2.0, "token_accuracy": 0.5, "general_loss": None,
            "completions": completions, "rows": rows} | metrics.text_scores(rows) | counts


@pytest.fixture
def scores() -> dict[str, dict[str, Any]]:
    chance = random.Random(3)
    losses = [chance.uniform(2, 30) for _ in range(30)]
    base = make_scores(losses, ["Anna meets Carl and Dora at 7"] * 10 + ["Anna says hi."] * 20)
    tuned = make_scores([loss - 2 for loss in losses], ["Anna says hi."] * 28 + ["He and Zoe", "Hi"])
    return {"base": base, "tuned": tuned}


def test_a_difference_is_paired_by_row(scores: dict[str, dict[str, Any]]) -> None:
    """Each row of tuned has the loss of base minus 2: the losses vary, their difference does not."""
    evaluation.add_differences(scores)
    for score in scores.values():
        low, high = score["intervals"]["loss"]
        assert low + 0.5 < score["loss"] < high - 0.5
    tuned = scores["tuned"]
    assert tuned["difference"]["loss"] == pytest.approx(-0.5)
    assert tuned["difference_intervals"]["loss"] == pytest.approx((-0.5, -0.5))
    low, high = tuned["difference_intervals"]["rougeL"]
    assert 0 < low < tuned["difference"]["rougeL"] < high


def test_unsupported_has_an_interval(scores: dict[str, dict[str, Any]]) -> None:
    evaluation.add_differences(scores)
    base, tuned = scores["base"], scores["tuned"]
    assert base["unsupported"] == 3 * 10 / (4 * 10 + 20) and tuned["unsupported"] == 1 / 30
    low, high = base["intervals"]["unsupported"]
    # mean and error of the ratio r of two sums (delta method): the sum of (u - r n)^2 over rows, by the sum of n
    rows = [(row["unsupported"], row["names"]) for row in base["rows"]]
    error = sum((u - 0.5 * n) ** 2 for u, n in rows) ** 0.5 / sum(n for _, n in rows)
    assert high - low == pytest.approx(2 * 2 * error, rel=0.2)
    assert tuned["difference_intervals"]["unsupported"][1] < 0  # fewer inventions than the base, beyond chance


def test_scores_that_a_model_lacks(scores: dict[str, dict[str, Any]]) -> None:
    scores["tuned"] = make_scores([4.0] * 30, ["no"] * 30)
    evaluation.add_differences(scores)
    assert scores["tuned"]["unsupported"] is None and "unsupported" not in scores["tuned"]["difference"]
    assert set(scores["base"]["intervals"]) == set(scores["tuned"]["intervals"]) | {"unsupported"}
    line = next(line for line in evaluation.report(scores, [], 0, 9).splitlines() if line.startswith("| unsupported"))
    assert [cell.strip() for cell in line.split("|")[4:-1]] == ["-"] * 4


def test_one_row_has_no_interval() -> None:
    scores = {name: make_scores([4.0], ["Anna"]) for name in ("base", "tuned")}
    evaluation.add_differences(scores)
    assert scores["base"]["intervals"]["loss"] is None and scores["tuned"]["difference"]["loss"] == 0
    assert "| loss " in evaluation.report(scores, [], 0, 9)


def test_the_rows_with_most_unsupported_content_are_shown(scores: dict[str, dict[str, Any]]) -> None:
    scores["tuned"] = make_scores([4.0] * 5, ["Anna", "He met Carl", "Zoe, Max and 8", "Anna and Dora", "no 7"])
    scores["base"] = make_scores([4.0] * 5, ["Eve"] * 5)
    evaluation.add_differences(scores)
    text = evaluation.report(scores, [], 2, 9)
    assert text.endswith("tuned: 4 of 5 completions have unsupported content; with the most:\n"
                         "rows.jsonl:2: Zoe, Max, 8\n  'Zoe, Max and 8'\nrows.jsonl:1: Carl\n  'He met Carl'")
    assert "Not seen: wrong relations" in text and "Eve" not in text
    assert "completions have unsupported" not in evaluation.report(scores, [], 0, 9)


def test_several_models_have_a_line_each(scores: dict[str, dict[str, Any]]) -> None:
    scores["runs/a"] = scores.pop("tuned")
    scores["base"]["general_loss"], scores["runs/a"]["general_loss"] = 3.0, 3.5
    evaluation.add_differences(scores)
    head, _, base, run = evaluation.report(scores, [], 0, 9).splitlines()[:4]
    assert "unsupported" in head and "forgetting" in head
    assert base.split()[1] == "base" and run.split()[1] == "runs/a" and "0.5000" in run
    assert scores["runs/a"]["forgetting"] == 0.5
