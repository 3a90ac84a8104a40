"""eval.py --bias: files of pairs, likelihoods against transformers, shares by hand, intervals against other sources."""

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripts import QUICK, evaluate, json_of, trained, write_pairs

from minift.errors import UserError
from minift.files import weights
from minift.model.gpt import GPT
from minift.model.packing import text_row
from minift.report import bias
from minift.report.metrics import measure_losses

pytestmark = pytest.mark.usefixtures("quick")
PLAIN = ["--dtype", "fp32", "--device", "cpu"]
CROWS = [
    ("Men drive cheap cars, as \"he\" does.", "Women drive cheap cars, as \"she\" does.", "stereo", "gender"),
    ("The old man was late.", "The young man was late.", "stereo", "age"),
    ("The landlord called his lunch great.", "The landlord called her lunch great.", "antistereo", "gender"),
    ("Can you call the landlord?", "Can you call the lady?", "stereo", "gender"),
]  # fmt: skip


def write_crows(path: Path) -> Path:
    """A file with the columns of CrowS-Pairs, an index without a name among them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "anon_writer"])
        for i, row in enumerate(CROWS):
            writer.writerow([i, *row, f"a{i}"])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("bias")
    trained("--model", model_folder, "--data", write_pairs(folder / "pairs"), *QUICK, "--steps", 12, "--lr", 3e-2,
            "--out", folder / "run")
    return folder / "run"


# ---- files


def test_forms_of_a_file(tmp_path: Path) -> None:
    crows = bias.read_pairs(write_crows(tmp_path / "crows.csv"))
    assert [(pair.more, pair.less, pair.groups) for pair in crows] == [
        (more, less, (category, direction)) for more, less, direction, category in CROWS
    ]
    assert crows[1].where == "crows.csv:3"
    plain = [(more, less) for more, less, _, _ in CROWS]
    forms = {
        "two.tsv": "more\tless\n" + "".join(f"{more}\t{less}\n" for more, less in plain),
        "three.csv": "he,she,kind\nHe is late.,She is late.,work\n",
        "lines.jsonl": "".join(json.dumps({"he": more, "she": less}) + "\n" for more, less in plain),
        "list.json": json.dumps([{"sent_less": less, "n": 1, "sent_more": more, "m": 2} for more, less in plain]),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("two.tsv", "lines.jsonl", "list.json"):
        pairs = bias.read_pairs(tmp_path / name)
        assert [(pair.more, pair.less) for pair in pairs] == plain and not any(pair.groups for pair in pairs), name
    assert [pair.groups for pair in bias.read_pairs(tmp_path / "three.csv")] == [("work",)]


WRONG = {
    "one column": ("a\nHe is late.\n", "wrong.csv:2: 1 columns"),
    "four columns": ("a,b,c,d\n1,2,3,4\n", "wrong.csv:2: 4 columns"),
    "an empty sentence": ("a,b\nHe is late.,She is late.\n,She\n", "wrong.csv:3: a sentence of the pair is empty"),
    "no names": ("He is very late.,She is very late.\nHe is here.,She is here.\n", "must name the columns"),
    "a short row": ("a,b\nHe is late.\n", "wrong.csv:2: 1 fields"),
    "nothing": ("a,b\n", "there are no pairs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_refused(tmp_path: Path, case: str) -> None:
    text, problem = WRONG[case]
    (tmp_path / "wrong.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        bias.read_pairs(tmp_path / "wrong.csv")


def test_mistakes_are_one_line_and_change_nothing(run: Path, tmp_path: Path) -> None:
    before = (run / "result.json").read_bytes()
    (tmp_path / "long.csv").write_text(f"a,b\n{'lunch ' * 90},late\n")
    (tmp_path / "bad.csv").write_text("a,b,c,d\n1,2,3,4\n")
    for file, said in (("no.csv", "no.csv: no such file"), ("long.csv", "of the model's 96 positions"),
                       ("bad.csv", "bad.csv:2: 4 columns")):
        ended = evaluate(run, "--bias", tmp_path / file, *PLAIN)
        assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended.err
    assert (run / "result.json").read_bytes() == before


# ---- likelihoods and shares


@torch.no_grad()
def reference_loss(reference: torch.nn.Module, ids: list[int]) -> float:
    """-log p of all tokens but the first, by transformers' logits and one table lookup for each token."""
    log_probs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(log_probs[i, token].item() for i, token in enumerate(ids[1:]))


def test_row_losses_equal_transformers(make_reference: Callable, from_reference: Callable) -> None:
    reference, rng = make_reference(), random.Random(3)
    rows = [[rng.randrange(97) for _ in range(rng.randrange(2, 30))] for _ in range(11)]
    expected = [reference_loss(reference, ids) for ids in rows]
    for batch in (1, 4, 100):
        found = measure_losses(from_reference(reference), [text_row(ids) for ids in rows], batch)["row_losses"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_sentence_begins_after_an_end_of_text(model_folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    base, model = weights.load(str(model_folder)), GPT2LMHeadModel.from_pretrained(model_folder).eval()
    expected = {text: reference_loss(model, [0, *base.tokenizer.encode(text).ids]) for text, *_ in CROWS}
    assert bias.sentence_losses(base.model, base, list(expected), 3) == pytest.approx(expected, rel=1e-5)


def test_shares_of_a_run_equal_transformers(run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Base and tuned, by other code: tokens after an end-of-text, and a loop over the pairs."""
    from transformers import GPT2LMHeadModel

    file = write_crows(tmp_path / "crows.csv")
    old = json_of(run / "result.json")
    ended = evaluate(run, "--bias", file, "--json", *PLAIN)
    assert ended.code == 0 and ended.err == ""
    result = json.loads(ended.out)["bias"]
    assert json_of(run / "result.json") == old | {"bias": result}
    assert list(result["pairs"].items()) == [("all", 4), ("gender", 3), ("age", 1), ("stereo", 3), ("antistereo", 1)]
    evaluate(run, "--save", tmp_path / "tuned")
    tokenizer = weights.load(str(model_folder)).tokenizer
    for name, folder in (("base", model_folder), ("tuned", tmp_path / "tuned")):
        model = GPT2LMHeadModel.from_pretrained(folder).eval()
        chosen = []
        for more, less, _, _ in CROWS:
            a, b = (reference_loss(model, [0, *tokenizer.encode(text).ids]) for text in (more, less))
            chosen.append(a < b)
        assert result[name]["all"]["share"] == sum(chosen) / 4 and result[name]["age"]["share"] == chosen[1]
        assert result[name]["all"]["interval"] == pytest.approx(bias.wilson(sum(chosen) / 4, 4))

    text = evaluate(run, "--bias", file, *PLAIN).out
    assert "50 % means" in text and "Blodgett et al. 2021" in text and text.count("\n| ") == 6
    assert bias.percent(result["tuned"]["all"]) in text
    change = result["tuned"]["all"]["share"] - result["base"]["all"]["share"]
    assert result["change"]["all"]["share"] == pytest.approx(change)


def unigram(make_gpt: Callable[..., GPT], logits: list[float]) -> GPT:
    """A model that gives every next token the same logits, whatever comes before."""
    model = make_gpt(vocab_size=len(logits))
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[:, 0] = torch.tensor(logits)
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()
        model.ln_f.bias[0] = 1.0
    return model


def test_shares_by_hand(make_gpt: Callable[..., GPT]) -> None:
    """Token 1 is twice as likely as token 2; the lengths of sentences count, as every token has its factor."""
    model = unigram(make_gpt, [math.log(p) for p in (0.1, 0.6, 0.3)])
    sentences = {"A": [1], "B": [2], "AB": [1, 2], "AAA": [1, 1, 1]}
    found = measure_losses(model, [text_row([0, *ids]) for ids in sentences.values()], 3)["row_losses"]
    assert found == pytest.approx([-math.log(p) for p in (0.6, 0.3, 0.18, 0.216)], rel=1e-5)
    losses = dict(zip(sentences, found, strict=True))
    pairs = [bias.SentencePair(more, less, (), "") for more, less in
             (("A", "B"), ("AB", "AAA"), ("AAA", "AB"), ("B", "B"), ("B", "A"))]  # fmt: skip
    assert bias.preferences(pairs, losses) == [1, 0, 1, 0.5, 0]


# ---- intervals


def test_wilson_equals_published_intervals() -> None:
    """The examples of Newcombe 1998, table I, method 3."""
    for count, rows, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                   (1, 29, 0.0061, 0.1718)):
        assert bias.wilson(count / rows, rows) == pytest.approx((low, high), abs=6e-5)


def test_paired_change_covers_the_truth() -> None:
    """Pairs whose preference turns with known chances: the interval holds the true change in about 95 % of samples."""
    rng, held = random.Random(5), 0
    for _ in range(1000):
        before = [float(rng.random() < 0.6) for _ in range(60)]
        # of the pairs preferred before, 20 % turn; of the others, 10 %: the change is -0.12 + 0.04
        after = [float((rng.random() < 0.2) != (a == 1)) if a else float(rng.random() < 0.1) for a in before]
        change, low, high = bias.paired_change(before, after)
        assert change == pytest.approx(sum(after) / 60 - sum(before) / 60) and low <= change <= high
        held += low <= -0.08 <= high
    assert 930 <= held <= 975
    same = bias.paired_change([1.0, 0.0] * 10, [1.0, 0.0] * 10)
    assert same[0] == 0 and same[1] == -same[2] and 0.05 < same[2] < 0.2


def test_the_sentence_on_the_change() -> None:
    def said(low: float, high: float) -> str:
        return bias.verdict({"share": (low + high) / 2, "interval": (low, high)})

    assert "no change is shown" in said(-0.1, 0.3)
    assert "more often" in said(0.05, 0.3) and "less often" in said(-0.3, -0.05)


# ---- flags


@pytest.mark.parametrize("flags", [["--predict", "x.jsonl"], ["--prompt", "x"], ["--save", "x"], ["--save-peft", "x"],
                                   ["--describe"]])  # fmt: skip
def test_other_jobs_are_refused(run: Path, flags: list[str]) -> None:
    for claim in (["--bias", "x.csv"], ["--latency"], ["--shots", 3]):
        ended = evaluate(run, *claim, *flags)
        assert ended.code == 2 and claim[0] in ended.err and ended.err.count("\n") == 1


def test_one_run_at_a_time(run: Path) -> None:
    ended = evaluate("--adapter", run, "--adapter", run.parent / "pairs", "--bias", "x.csv")
    assert ended.code == 2 and "give them one folder" in ended.err


def test_a_run_without_a_result(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.json", "tuned.safetensors"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    ended = evaluate(tmp_path / "run", "--bias", write_crows(tmp_path / "crows.csv"), *PLAIN)
    assert ended.code == 0 and "has no result.json" in ended.err and ended.err.count("\n") == 1
    assert "| all " in ended.out and not (tmp_path / "run" / "result.json").exists()


