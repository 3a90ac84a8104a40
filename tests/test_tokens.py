"""Pairs -> rows of tokens, against a tokenizer made on the spot and those of transformers."""

import dataclasses
import itertools
import random
import statistics
from pathlib import Path

import pytest
import tokenizers
from data_files import EOS, byte_tokenizer, encode, jsonl, load, numbered, write
from transformers import AddedToken, GPT2TokenizerFast

from minift.data.dataset import DataOptions, load_examples
from minift.data.pairs import Pair
from minift.data.tokens import Counts, tokenize
from minift.errors import UserError


def test_a_row_is_prompt_completion_and_end_of_text():
    tokenizer = byte_tokenizer()
    pairs = [Pair("Q:", "yes", "x:1"), Pair("Q:\n", "yes", "x:2"), Pair("\u00e9", "\u4e2d", "x:3")]
    examples, counts = encode(pairs, tokenizer, EOS, 100)
    for found, whole in zip(examples, ["Q: yes", "Q:\nyes", "\u00e9 \u4e2d"], strict=True):
        assert found.ids[-1] == EOS and tokenizer.decode(found.ids[:-1]) == whole
        assert tokenizer.decode(found.ids[: found.spans[0][0]]) == found.pair.prompt
    assert counts == Counts(joined=2) and [found.pair for found in examples] == pairs


def test_long_prompts_lose_their_beginning_and_completions_nothing(tmp_path):
    tokenizer = byte_tokenizer()
    generator = random.Random(0)

    def letters(alphabet: str) -> str:
        return "".join(generator.choices(alphabet, k=generator.randrange(1, 40)))

    pairs = [Pair(letters("abc"), letters("xyz"), f"x:{i}") for i in range(500)]
    examples, counts = encode(pairs, tokenizer, EOS, 30)
    fitting = [pair for pair in pairs if len(pair.completion) + 3 <= 30]  # space, end, a prompt token
    assert [found.pair for found in examples] == fitting and len(fitting) < len(pairs)
    for found in examples:
        assert len(found.ids) == min(30, len(found.pair.prompt) + len(found.pair.completion) + 2)
        ((begin, end),) = found.spans
        assert begin >= 1 and end == len(found.ids)
        assert found.pair.prompt.endswith(tokenizer.decode(found.ids[:begin]))
        assert tokenizer.decode(found.ids[begin:-1]) == " " + found.pair.completion
        assert found.ids[-1] == EOS
    assert counts.shortened == sum(len(pair.prompt) + len(pair.completion) + 2 > 30 for pair in fitting)
    assert counts.dropped == len(pairs) - len(fitting)
    lengths = [len(found.ids) for found in examples]
    assert counts.first_dropped == next(pair for pair in pairs if pair not in fitting).where

    content = jsonl([{"prompt": pair.prompt, "completion": pair.completion} for pair in pairs])
    rows, lines = load(write(tmp_path / "rows.jsonl", content), 30, split="100,0,0")
    assert [(row.ids, row.spans) for row in rows["train"]] == [(row.ids, row.spans) for row in examples]
    report = lines[2]
    first = next(number for number, pair in enumerate(pairs, 1) if pair not in fitting)
    assert f"train: {len(examples)} rows, tokens median {statistics.median_low(lengths)} / 95 % " in report
    assert "100% end in end-of-text" in report and "max 30" in report
    assert f"prompts cut: {counts.shortened}" in report
    assert report.endswith(f"does not fit: {counts.dropped}, first rows.jsonl:{first}")


def test_no_room_at_all(tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": "p", "completion": "too long"}]))
    with pytest.raises(UserError, match="rows.jsonl:1 and every other row: no room in 5 tokens .*--max-length"):
        load(path, 5, split="100,0,0")
    with pytest.raises(UserError, match="--max-length 2"):
        load(path, 2)
    assert encode([], byte_tokenizer(), EOS, 5) == ([], Counts())
    rows, lines = load(path, 100, split="100,0,0")
    assert "val: no rows" in lines and len(rows["train"]) == 1


def test_the_report_counts_rows_that_do_not_end(tmp_path):
    path = write(tmp_path / "a.txt", "abcd")
    _, lines = load(path, 4, split="100,0,0")
    assert "50% end in end-of-text" in lines[2]  # the second of two windows


def test_the_name_of_a_special_token_can_be_text():
    tokenizer = byte_tokenizer()
    assert EOS in tokenizer.encode("a<|endoftext|>b").ids  # the default of tokenizers
    examples, _ = encode([Pair("a<|endoftext|>b", "c<|endoftext|>", "x:1")], tokenizer, EOS, 100,
                         control_tokens="text")
    ids = examples[0].ids[:-1]
    assert EOS not in ids and tokenizer.decode(ids) == "a<|endoftext|>b c<|endoftext|>"
    assert EOS in tokenizer.encode("<|endoftext|>").ids  # the caller's tokenizer is left as it was


def test_settings_of_the_tokenizer_do_not_reach_the_rows():
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=0)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)])
    assert [len(ids) for ids in tokenize(tokenizer, ["abcdefgh", "ab"])] == [8, 2]
    assert tokenizer.truncation["max_length"] == 4 and tokenizer.padding is not None


def test_join_and_white_space():
    tokenizer = byte_tokenizer()
    sides = [("a", "b"), ("a ", "b"), ("a", "\tb"), ("a\n", " b ")]
    pairs = [Pair(prompt, completion, f"x:{i}") for i, (prompt, completion) in enumerate(sides)]
    for join, whole in ((" ", "a b"), ("", "ab"), ("\n###\n", "a\n###\nb")):
        examples, counts = encode(pairs, tokenizer, EOS, 100, join)
        rows = [tokenizer.decode(row.ids[:-1]) for row in examples]
        assert rows == [whole, "a b", "a\tb", "a\n b "] and counts.joined == bool(join)


def test_the_join_and_control_tokens_are_reported(tmp_path):
    tokenizer = byte_tokenizer()
    rows = numbered(19) + [{"prompt": "a<|endoftext|>", "completion": " b"}]
    options = DataOptions(data=str(write(tmp_path / "rows.jsonl", jsonl(rows))), join="\\n")
    limits = {"train": None, "val": None, "test": None}
    _, lines, _ = load_examples(options, 0, tokenizer, EOS, 100, limits)
    assert lines[-2:] == [
        r"'\n' put between prompt and completion: 19 of 20 rows, where neither has white space there "
        "(--join)",
        "control tokens in the texts: <|endoftext|> 1 (--control-tokens text reads them as text)"]
    options = dataclasses.replace(options, join="", control_tokens="text")
    assert "test: " in load_examples(options, 0, tokenizer, EOS, 100, limits)[1][-1]


def test_a_row_that_ends_in_end_of_text_gets_no_second_one():
    tokenizer = byte_tokenizer()
    pairs = [Pair("a", "b<|endoftext|>", "x:1"), Pair("a", "b<|endoftext|>\n", "x:2"), Pair("a", "b", "x:3")]
    examples, _ = encode(pairs, tokenizer, EOS, 100)
    assert [row.ids.count(EOS) for row in examples] == [1, 2, 1]
    assert examples[0].ids == examples[2].ids
    assert examples[0].pair.completion == "b"  # an answer is compared without it
    fitting, _ = encode(pairs[:1], tokenizer, EOS, 4)
    assert fitting[0].ids == examples[0].ids


def test_a_chat_is_one_row_with_several_spans():
    tokenizer = byte_tokenizer()
    prompt = "User: a\nAssistant: bcd\nUser: e\nAssistant:"
    answer = prompt.index(" bcd")
    pair = Pair(prompt, "f", "x:1", ((answer, answer + 4),))
    (row,), _ = encode([pair], tokenizer, EOS, 100)
    assert tokenizer.decode(row.ids[:-1]) == prompt + " f"
    learned = [tokenizer.decode(row.ids[begin:end], skip_special_tokens=False) for begin, end in row.spans]
    assert learned == [" bcd", " f<|endoftext|>"]
    for length in range(4, 50):  # the beginning is cut off, and the spans move with it
        (row,), counts = encode([pair], tokenizer, EOS, length)
        learned = [tokenizer.decode(row.ids[begin:end]) for begin, end in row.spans]
        assert learned[-1] == " f" and all(" bcd".endswith(text) for text in learned[:-1])
        assert row.spans[0][0] >= 1 and counts.shortened == (length < len(prompt) + 3)
        assert len(row.ids) == min(length, len(prompt) + 3)


@pytest.mark.parametrize("length", [3, 10, 26, 27, 28, 29, 100])
def test_every_token_of_a_text_is_learned_once(tmp_path, length):
    tokenizer = byte_tokenizer()
    text = "abcdefghijklmnopqrstuvwxyz"
    examples, _ = encode([Pair("", text, "x:1")], tokenizer, EOS, length)
    learned = [i for row in examples for begin, end in row.spans for i in row.ids[begin:end]]
    assert tokenizer.decode(learned, skip_special_tokens=False) == text + "<|endoftext|>"
    assert examples[0].ids[0] == EOS and all(2 <= len(row.ids) <= length for row in examples)
    assert "".join(row.pair.completion for row in examples) == text
    for row, following in itertools.pairwise(examples):
        assert row.ids[-1] == following.ids[0]
    rows, lines = load(write(tmp_path / "a.txt", text), length, split="100,0,0")
    assert [(row.ids, row.pair.completion) for row in rows["train"]] == \
        [(row.ids, row.pair.completion) for row in examples]
    assert lines[2].endswith("cut from 1 texts, each begins after an end-of-text")


def transformers_folder(tokenizer_folder: Path, out: Path, **settings) -> GPT2TokenizerFast:
    """A folder with control tokens, some of them special, as transformers saves it."""
    theirs = GPT2TokenizerFast(str(tokenizer_folder / "vocab.json"), str(tokenizer_folder / "merges.txt"),
                               **settings)
    theirs.add_special_tokens({"additional_special_tokens": ["<USER>", AddedToken("[MASK]", lstrip=True)]})
    theirs.add_tokens(["<BOT>", AddedToken("<end>", rstrip=True), "landlord"])
    theirs.save_pretrained(out)
    return theirs


CONTROL_TEXTS = ["<USER>Hi<BOT>Hello<|endoftext|>", " a [MASK] b<end> c", "the landlord, <user>",
                 "caf\u00e9<USER>", "<|endoftext|><|endoftext|>",
                 "  two  spaces\n\n<BOT>\n", "[MASK][MASK]", "can't <end>"]


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}], ids=str)
def test_tokens_are_those_of_transformers(tokenizer_folder, tmp_path, settings):
    theirs = transformers_folder(tokenizer_folder, tmp_path, **settings)
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenize(ours, CONTROL_TEXTS) == theirs(CONTROL_TEXTS, add_special_tokens=False).input_ids
    as_text = tokenize(ours, CONTROL_TEXTS, "text")
    special = set(theirs.all_special_ids)
    assert not special & {i for ids in as_text for i in ids}
    as_theirs = theirs(CONTROL_TEXTS, add_special_tokens=False, split_special_tokens=True).input_ids
    assert as_text == as_theirs
    eos = theirs.eos_token_id
    pairs = [Pair("<USER>Hi<BOT>", "Hello there", "x:1"), Pair("a\n", "b", "x:2")]
    examples, counts = encode(pairs, ours, eos, 90)
    whole = theirs(["<USER>Hi<BOT> Hello there", "a\nb"], add_special_tokens=False).input_ids
    assert [row.ids for row in examples] == [ids + [eos] for ids in whole]
    assert counts.control_tokens == {"<USER>": 1, "<BOT>": 1}


def test_the_tokens_that_a_tokenizer_puts_first_begin_each_row():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<BOS>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<BOS> $A <|endoftext|>", special_tokens=[("<|endoftext|>", EOS), ("<BOS>", EOS + 1)])
    tokenizer.enable_padding(pad_id=0, length=50, direction="left")
    tokenizer.enable_truncation(2)
    examples, _ = encode([Pair("a", "b", "x:1"), Pair("", "cd", "x:2")], tokenizer, EOS, 100)
    decoded = [tokenizer.decode(row.ids, skip_special_tokens=False) for row in examples]
    assert decoded == ["<BOS>a b<|endoftext|>", "<BOS>cd<|endoftext|>"]
    assert [row.spans for row in examples] == [((2, 5),), ((1, 4),)]
    (short,), _ = encode([Pair("abc", "d", "x:1")], tokenizer, EOS, 5)
    assert tokenizer.decode(short.ids, skip_special_tokens=False) == "<BOS>c d<|endoftext|>"


def test_a_base_without_end_of_text_is_refused(tmp_path):
    options = DataOptions(data=str(write(tmp_path / "rows.jsonl", jsonl(numbered(9)))))
    with pytest.raises(UserError, match="no file of the base names its end-of-text"):
        load_examples(options, 0, byte_tokenizer(), None, 100, {"train": None})
