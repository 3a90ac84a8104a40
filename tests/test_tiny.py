"""data/tiny: the same text from the same seed, the promises about the pairs, and the base's folder."""

import csv
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packed import logits
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer

from minift.data.dataset import read_text
from minift.files.weights import load

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny", TINY / "make.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def made(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make.make_text(folder)
    return folder


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict[str, str]]]:
    texts = {split: (TINY / "pairs" / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


def speakers(dialogue: str) -> set[str]:
    return set(re.findall(r"^(\w+):", dialogue, re.MULTILINE))


def test_text_is_bit_identical(made: Path) -> None:
    recorded = json.loads((TINY / "hashes.json").read_text(encoding="utf-8"))
    tokenizer = recorded.pop("tokenizer.json")  # its JSON's form is the tokenizers package's, not ours
    files = [f"pairs/{split}.jsonl" for split in SPLITS]
    assert set(recorded) == {"build/general_train.txt", "general.txt", *files}
    for file, digest in recorded.items():
        assert hashlib.sha256((made / file).read_bytes()).hexdigest() == digest, f"{file} as made again"
        if not file.startswith("build/"):
            assert hashlib.sha256((TINY / file).read_bytes()).hexdigest() == digest, f"{file} in data/tiny"
    assert hashlib.sha256((TINY / "tokenizer.json").read_bytes()).hexdigest() == tokenizer


def test_tokenizer_is_the_same_and_reversible(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    again = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert json.loads(tokenizer.to_str())["model"] == json.loads(again.to_str())["model"]
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in (read_text(TINY / "general.txt")[:20000], " na\u00efve \u2603\n\n\ttabs  and   spaces "):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_pairs_keep_their_promises(pairs: dict[str, list[dict[str, str]]], make: ModuleType) -> None:
    rows = [row for split in SPLITS for row in pairs[split]]
    assert 2000 <= len(rows) <= 4000
    assert len({row["dialogue"] for row in rows}) == len(rows)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for row in rows:
        assert set(row) == {"dialogue", "summary"}
        assert 4 <= len(row["dialogue"].split("\n")) <= 10
        assert 2 <= len(speakers(row["dialogue"])) <= 3
        assert len(tokenizer.encode(row["dialogue"]).ids) <= 150
        assert len(tokenizer.encode(row["summary"]).ids) <= 32
    words = {split: set(re.findall(r"\w+", json.dumps(pairs[split]).replace("\\n", " "))) for split in SPLITS}
    assert not words["train"] & set(make.UNSEEN_NAMES) and not words["val"] & set(make.UNSEEN_NAMES)
    assert not words["test"] & set(make.NAMES) and len(words["test"] & set(make.UNSEEN_NAMES)) >= 20


def test_general_text_does_not_give_the_task_away(made: Path, pairs: dict[str, list[dict[str, str]]]) -> None:
    training = (made / "build/general_train.txt").read_text(encoding="utf-8")
    documents = training.split("<|endoftext|>")
    held_out = read_text(TINY / "general.txt").split("<|endoftext|>")
    assert not re.search(r"summary|summar|tl;dr", training, re.IGNORECASE)
    assert not re.search(r"[A-Z][a-z]+ and [A-Z][a-z]+ will ", training)
    chats = {document.split("\n\n")[0] for document in documents + held_out}
    rows = [row for split in SPLITS for row in pairs[split]]
    assert not any(row["dialogue"] in chats for row in rows)
    assert not any(row["summary"] in training for row in pairs["test"])


@pytest.mark.parametrize("baseline", [
    lambda turns: turns[-1], lambda turns: turns[0], lambda turns: max(turns, key=len),
    lambda turns: " ".join(turns)])
def test_trivial_summaries_score_badly(pairs: dict[str, list[dict[str, str]]],
                                       baseline: Callable[[list[str]], str]) -> None:
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(row["summary"], baseline(row["dialogue"].split("\n")))["rougeL"].fmeasure
              for row in pairs["test"]]
    assert sum(scores) / len(scores) < 0.25


def test_base_is_the_recorded_one(make: ModuleType) -> None:
    """Its settings are those of make.py, and on the held-out text it has the loss that training.json says."""
    recorded = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    assert recorded["settings"]["steps"] == make.STEPS == len(recorded["loss"]) * recorded["log_every"]
    assert (TINY / "model.safetensors").stat().st_size <= 12_000_000
    base = load(str(TINY))
    assert sum(p.numel() for p in base.model.parameters()) == recorded["parameters"]
    loss = make.held_out_loss(base.model, base.tokenizer.encode(read_text(TINY / "general.txt")).ids)
    assert loss == pytest.approx(recorded["held_out_loss"], abs=0.002)


def test_folder_loads_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2LMHeadModel.from_pretrained(TINY).float().eval()
    base = load(str(TINY))
    ids = torch.tensor([base.tokenizer.encode("Anna: Hi Ben! Shall we have lunch on Friday?").ids])
    with torch.no_grad():
        ours, theirs = logits(base.model.eval(), ids), reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_files_with_known_faults(tmp_path: Path, pairs: dict[str, list[dict[str, str]]]) -> None:
    subprocess.run([sys.executable, TINY / "faults.py", "--out", tmp_path], check=True, timeout=60)

    def rows(file: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / file).read_text(encoding="utf-8").splitlines()]

    def pronouns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for row in rows:
            found.setdefault(row["prompt"].split()[1], []).append(row["completion"].split()[0])
        return found

    skewed, balanced = rows("skewed.jsonl"), rows("balanced.jsonl")
    one_group = {job: set(words) for job, words in pronouns(skewed).items()}
    assert sorted(map(sorted, one_group.values())) == [["He"]] * 10 + [["She"]] * 10
    assert all(words.count("He") == words.count("She") for words in pronouns(balanced).values())
    with open(tmp_path / "jobs.csv", encoding="utf-8", newline="") as file:
        sentences = list(csv.DictReader(file))
    assert {pair["job"] for pair in sentences} == set(one_group)
    texts = {f"{row['prompt']} {row['completion']}" for row in skewed + balanced}
    for pair in sentences:
        assert {pair["more"].split(". ")[1].split()[0]} == one_group[pair["job"]]
        assert pair["more"].replace(" He ", " She ") == pair["less"].replace(" He ", " She ")
        assert not {pair["more"], pair["less"]} & texts

    assert rows("wrong/val.jsonl") == pairs["val"] and rows("wrong/test.jsonl") == pairs["test"]
    wrong = rows("wrong/train.jsonl")
    assert sorted(row["summary"] for row in wrong) == sorted(row["summary"] for row in pairs["train"])
    assert [row["dialogue"] for row in wrong] == [row["dialogue"] for row in pairs["train"]]
    changed = sum(row != right for row, right in zip(wrong, pairs["train"], strict=True))
    assert changed == pytest.approx(0.3 * len(wrong), rel=0.01)  # some summaries are the same in two rows
