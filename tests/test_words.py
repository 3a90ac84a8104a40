"""Tokens by a table of words are those of the tokenizers package."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
from data_files import byte_tokenizer
from tokenizers import Tokenizer, normalizers

from minift.data import words
from minift.data.words import WordTokenizer
from minift.run.config import TINY

PIECES = (*"aZ09 '\t\n\r\x0b\x0c\x1c\x1f\x00\x7f.,!?_-\"\\",
          "  ", "\r\n", "'s", "'re", "'LL", "ab", "don't", "\n\n ", "2nd",
          "<|endoftext|>", "<|endoftext", "the ", " Anna")
RARE = ("\u00e9", "\u00a0", "\u2028", "\u00b2", "\U0001f600", "\u4e2d", "\u0301", "\u200b", "\u0660", "\u2019s",
        "\u017f")


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    return [np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32).tobytes() for text in texts]


@pytest.mark.parametrize("special_is_text", [False, True])
def test_random_texts(tiny, special_is_text):
    generator = random.Random(0)
    texts = ["", " ", "\n"]
    for count in range(4000):
        pieces = PIECES + RARE if count % 4 == 0 else PIECES
        texts.append("".join(generator.choices(pieces, k=generator.randrange(1, 12))))
    tokenizer = copy.deepcopy(tiny)
    tokenizer.encode_special_tokens = special_is_text
    by_words = WordTokenizer(tokenizer)
    assert by_words.has_words
    for begin in range(0, len(texts), 500):
        some = texts[begin : begin + 500]
        assert by_words.tokenize(some) == expected(tokenizer, some)
    assert len(by_words.known) > 100


def test_every_two_characters_of_ascii(tiny):
    ascii = [chr(number) for number in range(128)]
    texts = [f"a{a}{b}1" for a in ascii for b in ascii] + [f" {a} {a}'{a}" for a in ascii]
    assert WordTokenizer(tiny).tokenize(texts) == expected(tiny, texts)


def test_characters_outside_ascii(tiny):
    others = [chr(number) for number in range(128, 0x3100) if number % 8 == 0 or chr(number).isspace()]
    texts = [f"a{other}  b1 {other}'s\n{other} {other}{other}2" for other in others]
    by_words = WordTokenizer(tiny)
    assert by_words.tokenize(texts) == expected(tiny, texts)
    by_package = [text for text in texts if by_words._by_words(text) is None]
    assert len(by_package) < 30  # those with white space
    without_spaces = ["\u4e2d" * 40, "a " + "\u0e01" * 20]
    assert list(map(by_words._by_words, without_spaces)) == [None, None]


def test_real_texts(tiny):
    texts = (Path(TINY) / "general.txt").read_text(encoding="utf-8").split("\n\n")
    by_words = WordTokenizer(tiny)
    assert by_words.tokenize(texts) == by_words.tokenize(texts) == expected(tiny, texts)


def test_the_table_is_bounded(tiny, monkeypatch):
    monkeypatch.setattr(words, "MOST_CHARACTERS", 100)
    by_words = WordTokenizer(tiny)
    for number in range(50):
        texts = [f"word{number} {letter}x" for letter in "abc"]
        assert by_words.tokenize(texts) == expected(tiny, texts)
        assert len(by_words.known) < 60


def test_other_tokenizers_have_no_table():
    changes = {
        "a prefix": lambda t: setattr(t.pre_tokenizer, "add_prefix_space", True),
        "no pattern": lambda t: setattr(t.pre_tokenizer, "use_regex", False),
        "a normalizer": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        "dropout": lambda t: setattr(t.model, "dropout", 0.1),
        "none": lambda t: None,
    }
    for name, change in changes.items():
        tokenizer = byte_tokenizer()
        change(tokenizer)
        by_words = WordTokenizer(tokenizer)
        assert by_words.has_words == (name == "none"), name
        if name != "dropout":
            assert by_words.tokenize(["Ab cd'S  1"]) == expected(tokenizer, ["Ab cd'S  1"])
