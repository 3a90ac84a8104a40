"""ROUGE against the rouge-score package on ASCII text, and its words in other scripts against Unicode's own
properties, as the regex package knows them."""

import random
import unicodedata

import pytest
import regex
from rouge_score.rouge_scorer import RougeScorer

from minift.report import rouge

WORDS = ("the a cat dog Amanda baked cookies; will bring Jerry some tomorrow, don't can't it's 7pm U.S. "
         "a1b2 e-mail 3.14 #tag _x_ I'll ... ! snake_case A&B").split()
ODD = ["", " ", "...", "\n\n", "a", "A a A", "the the the the", "x\ty\nz", "a\x00b", "\x1fa\x7f", "__",
       "1_000"]


def texts(count: int) -> list[tuple[str, str]]:
    """Pairs of texts that share much, little or nothing, in many lengths."""
    chance = random.Random(0)
    pairs = []
    for _ in range(count):
        reference = chance.choices(WORDS, k=chance.randrange(40))
        prediction = [w for w in reference if chance.random() < 0.7]
        prediction += chance.choices(WORDS, k=chance.randrange(12))
        if chance.random() < 0.3:
            chance.shuffle(prediction)
        pairs.append((" ".join(prediction), chance.choice([" ", "\n", "  ", "-"]).join(reference)))
    pairs += [("".join(chance.choices([chr(i) for i in range(128)], k=60)),
               "".join(chance.choices([chr(i) for i in range(128)], k=60))) for _ in range(count)]
    return pairs + [(a, b) for a in ODD for b in ODD]


def test_rouge_equals_the_package_on_ascii_text() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    nonzero = 0
    for prediction, reference in texts(200):
        wanted = {name: score.fmeasure for name, score in scorer.score(reference, prediction).items()}
        assert rouge.rouge(prediction, reference) == pytest.approx(wanted, abs=1e-12), (prediction, reference)
        nonzero += wanted["rouge1"] > wanted["rougeL"] > wanted["rouge2"] > 0
    assert nonzero > 80


@pytest.mark.parametrize("text, tokens", [
    ("Привет, мир!", ["привет", "мир"]),
    ("καλημέρα κόσμε", ["καλημέρα", "κόσμε"]),
    ("Don\u2019t: na\u00efve \u00dcber-caf\u00e9s", ["don", "t", "na\u00efve", "\u00fcber", "caf\u00e9s"]),
    ("cafe\u0301", ["caf\u00e9"]),  # the accent as a character of its own
    ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are combining marks
    ("笛を吹く。", ["笛", "を", "吹", "く"]),
    ("ラーメン", ["ラ", "ー", "メ", "ン"]),
    ("第12章 GPT模型", ["第", "12", "章", "gpt", "模", "型"]),
    ("ที่นี่", ["ที่", "นี่"]),  # a Thai letter with its vowel sign and tone mark
    ("한국어 문장", ["한국어", "문장"]),
    ("مرحبا\u060c می\u200cخواهم", ["مرحبا", "میخواهم"]),  # an invisible joiner parts no word
    ("٣٤ ½ x²", ["٣٤", "½", "x²"]),
    ("\U0001f600 \u2764\ufe0f ... —", []),  # no words, and a mark that belongs to none
    ("snake_case", ["snake", "case"]),
    ("snake_café", ["snake", "café"]),
])
def test_words_of_any_script(text: str, tokens: list[str]) -> None:
    assert rouge.rouge_tokens(text) == tokens
    expected = 1.0 if tokens else 0.0
    assert rouge.rouge(text, text)["rougeL"] == rouge.rouge(text, text)["rouge1"] == expected


def test_part_of_a_text_in_another_script_is_scored() -> None:
    scores = rouge.rouge("мама мыла раму", "мама мыла окно")
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})
    assert rouge.rouge("我喜欢猫", "我喜欢狗")["rougeL"] == pytest.approx(3 / 4)


def test_scripts_without_spaces_are_those_of_unicode() -> None:
    names = ("Han Hiragana Katakana Bopomofo Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham "
             "Tai_Viet").split()
    unspaced = regex.compile("[" + "".join(rf"\p{{{name}}}" for name in names) + "]")
    shared = regex.compile(r"\p{Common}")  # such as the Japanese prolonged sound mark
    for code in range(0x16FE0):  # beyond are historic letters
        char = chr(code)
        if unicodedata.category(char)[0] in "LN" and not shared.match(char):
            assert rouge.is_unspaced(char) == bool(unspaced.match(char)), f"U+{code:04X}"


def test_longest_common_subsequence_of_long_texts() -> None:
    chance = random.Random(1)
    for size in (1, 63, 64, 65, 200):
        a, b = (chance.choices("abcde", k=size) for _ in range(2))
        table = [[0] * (size + 1) for _ in range(size + 1)]
        for i in range(size):
            for j in range(size):
                longer = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else longer
        assert rouge.longest_common_subsequence(a, b) == table[-1][-1]
