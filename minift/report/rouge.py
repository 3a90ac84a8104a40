"""ROUGE (Lin 2004): how many words, and sequences of words, a text has in common with its reference.

On ASCII text the scores equal those of the rouge-score package without stemming. That package drops every
other character, so a text in Russian or Chinese would always score 0; here a word may be of any script.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Unicode blocks of scripts that write no spaces between words: there, each character counts as a word.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x3000, 0x312F),  # Japanese kana, Bopomofo
    (0x31A0, 0x9FFF),  # their extensions, Chinese characters
    (0xA9E0, 0xA9FF),  # Burmese, extended
    (0xAA60, 0xAADF),  # Burmese, extended; Tai Viet
    (0xF900, 0xFAFF),  # Chinese characters
    (0xFF66, 0xFF9F),  # Japanese kana of half width
    (0x1B000, 0x1B16F),  # historic kana
    (0x20000, 0x3FFFF),  # Chinese characters
)


def rouge_tokens(text: str) -> list[str]:
    """The words of a text in lower case: sequences of letters, digits and combining marks."""
    text = text.lower()
    if text.isascii():
        return re.findall("[a-z0-9]+", text)  # as the rouge-score package
    pieces: list[str] = []  # the text with spaces between its words
    previous = "gap"  # the kind of the last character: "gap", or a letter of a "spaced" or "unspaced" script
    for char in unicodedata.normalize("NFC", text):  # an accented letter may be written in two ways
        category = unicodedata.category(char)
        if category == "Cf":
            continue  # invisible: a soft hyphen, a joiner, the direction of the text
        if category[0] == "M" and previous != "gap":
            pieces.append(char)  # a mark belongs to the character before it
        elif category[0] not in "LN":  # no letter, no number
            pieces.append(" ")
            previous = "gap"
        else:
            script = "unspaced" if is_unspaced(char) else "spaced"
            if script == "unspaced" or script != previous:
                pieces.append(" ")
            pieces.append(char)
            previous = script
    return "".join(pieces).split()


def is_unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in UNSPACED)


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L as F-measures in 0..1; 0 where either text has no word."""
    p, r = rouge_tokens(prediction), rouge_tokens(reference)
    scores = {}
    for n in (1, 2):
        p_grams, r_grams = ngrams(p, n), ngrams(r, n)
        overlap = (p_grams & r_grams).total()
        scores[f"rouge{n}"] = f_measure(overlap, p_grams.total(), r_grams.total())
    scores["rougeL"] = f_measure(longest_common_subsequence(p, r), len(p), len(r))
    return scores


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    """The number of times that each sequence of n tokens occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def f_measure(matches: int, predicted: int, expected: int) -> float:
    """2 P R / (P + R) of precision P = matches / predicted and recall R = matches / expected."""
    return 2 * matches / (predicted + expected) if matches else 0.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length (Hyyrö 2004, Bit-parallel LCS-length computation revisited)."""
    # the usual table of len(a) x len(b), with each row in the bits of one long integer
    positions: dict[str, int] = {}  # bit i of positions[word]: a[i] is the word
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    all_bits = (1 << len(a)) - 1
    row = all_bits  # bit i is 0 where the length grows at a[i]
    for word in b:
        hits = row & positions.get(word, 0)
        row = (row + hits | row - hits) & all_bits
    return len(a) - row.bit_count()
