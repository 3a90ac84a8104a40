"""Unsupported content: names and numbers of a completion that are neither in its prompt nor in its reference.

This is the part of hallucination that can be counted. Names are capitalised words, days and months included, and all
nouns in German. Where a capital says little, at the start of a sentence and in words of capitals, a word that the rows
mostly write in lower case is no name (truecasing, Lita et al. 2003). Numbers are digits of any script. Words are
compared without case, accents and endings such as "'s", numbers by value. Scripts without capitals (Arabic, Chinese,
Hindi) have numbers only.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LIMITS = ("names and numbers that are neither in the prompt nor in the reference. Not seen: wrong relations or verbs, "
          "invented facts without names, names in lower case. A number in words does not support one in digits")
NOT_NAMES = frozenset(("i", "am", "pm", "mr", "mrs", "ms", "dr", "prof"))  # I'm, 7 PM, Mrs Brown
TITLES = frozenset(("mr", "mrs", "ms", "dr", "prof", "st"))  # a point after them does not end a sentence
LETTER = r"[^\W\d_][\u0300-\u036f]*"  # with accents that have no character together with their letter
WORD = rf"(?:{LETTER})+"
PIECE = re.compile(
    r"(?P<number>\d{1,3}(?:[ ']\d{3})+(?:[.,]\d+)?(?![\d:])|\d+(?:[.,:]\d+)*)"
    rf"|(?P<acronym>(?<!\w)(?:{LETTER}\.){{2,}})"
    rf"|(?P<word>{WORD}(?:['-]{WORD})*)"
)
# between two words of a sentence; after anything else a capital is doubtful, such as after the colon in "Anna: Hi"
INSIDE = re.compile("[ \t,;()&/'-]+")
MORNING_HOURS = frozenset(map(str, range(12)))
AFTERNOON = re.compile(r" ?p\.?m\b", re.IGNORECASE)
SAME = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2010": "-", "\u066b": ".", "\u066c": ","})
# Russian and Greek names end differently in each case: compared without these endings, after at least two letters
RUSSIAN_ENDING = re.compile(r"(?<=\w\w)(?:[аеиоуыэюяьі]|(?<=[аеиоуыя])[мх]|(?<=[ое])г(?=о)){1,5}$")
GREEK_ENDING = re.compile(r"(?<=\w\w)[αεηιουω]{1,3}[σν]?$")


class Piece(NamedTuple):
    """A word or a number of a text."""

    text: str
    keys: tuple[str, ...]  # the folded parts of a word; the readings of a number, see `readings`
    kind: str  # "number", "word", "name", or "doubtful": a capitalised word that may be no name


def unify(text: str) -> str:
    """The text with one form for each character: digits in ASCII, ' for every apostrophe, no invisible characters."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text).translate(SAME)
    changes: dict[int, str | None] = {}
    for char in {char for char in text if not char.isascii()}:
        if char.isdecimal():
            changes[ord(char)] = str(unicodedata.decimal(char))
        elif unicodedata.category(char) == "Cf":  # a soft hyphen, a joiner, the direction of the text
            changes[ord(char)] = None
    return text.translate(changes)


def fold(word: str) -> str:
    """A word without case, accents and endings."""
    if word.isascii():
        word = word.lower()
    else:
        parts = unicodedata.normalize("NFD", word.casefold())
        word = "".join(char for char in parts if unicodedata.category(char) != "Mn").replace("\u0131", "i")
        if "\u0370" <= word[-1:] < "\u0400":
            return GREEK_ENDING.sub("", word)
        if "\u0400" <= word[-1:] < "\u0530":
            return RUSSIAN_ENDING.sub("", word)
    return word[:-1] if len(word) > 3 and word[-1] == "s" else word  # Annas, Germans


def pieces(text: str) -> Iterator[Piece]:
    """The words and numbers of a text, in their order."""
    text = unify(text)
    end, before = 0, ""  # of the piece before
    for match in PIECE.finditer(text):
        found, gap = match[0], text[end : match.start()]
        if match["number"]:
            yield from numbers(found, AFTERNOON.match(text, match.end()) is not None)
        else:
            inside = end > 0 and INSIDE.fullmatch(gap) is not None
            after_title = gap == ". " and fold(before) in TITLES
            after_digit = not gap and text[end - 1 : end].isdigit()  # 7PM, 3D
            yield word_piece(found, inside or after_title, after_digit)
        end, before = match.end() - bool(match["acronym"]), found  # the last point of p.m. may end the sentence


def word_piece(word: str, inside: bool, after_digit: bool) -> Piece:
    """A word as a piece. The keys of a name are its capitalised parts: Jean and Luc, Anna of Anna's and of d'Anna."""
    parts = [word.replace(".", "")] if "." in word else re.split("['-]", word)
    capitals = [part for part in parts if part[0].isupper()]
    keys = tuple(fold(part) for part in capitals or parts)
    if not capitals or after_digit or len(word) == 1 or keys[0] in NOT_NAMES:  # Q: and A: are no names
        return Piece(word, tuple(map(fold, parts)), "word")
    return Piece(word, keys, "doubtful" if capitals[0].isupper() or not inside else "name")


def numbers(text: str, afternoon: bool) -> Iterator[Piece]:
    """The number of a text such as "1,000.50", or several: those of a date."""
    parts, separators = re.split("[.,:' ]", text), re.findall("[.,:' ]", text)
    keys = readings(parts, separators)
    if not keys:  # 12.10.2020: a date, or a version
        for part in parts:
            yield Piece(part, (plain(part),), "number")
        return
    hour, *minutes = keys[-1].split(":")
    if afternoon and hour in MORNING_HOURS:  # 7:30 pm is 19:30
        keys.append(":".join([str(int(hour) + 12), *minutes]))
    yield Piece(text, tuple(keys), "number")


def readings(parts: list[str], separators: list[str]) -> list[str]:
    """What the parts of a number may mean: 1.000 is 1000 or 1, 7.30 is 7.3 or a time, and 7:00 is 7."""
    if not separators:
        return [plain(parts[0])]
    if ":" in separators:
        return [clock(parts)] if len(set(separators)) == 1 else []
    keys = []
    *whole, last = parts
    groups = len(whole[0]) <= 3 and all(len(part) == 3 for part in whole[1:]) and len(set(separators[:-1])) <= 1
    if groups and len(last) == 3 and len(set(separators)) == 1:
        keys.append(plain("".join(parts)))
    if (groups or len(parts) == 2) and separators[-1] in ".," and separators.count(separators[-1]) == 1:
        keys.append(plain("".join(whole), last))
    if len(parts) == 2 and len(parts[0]) <= 2 and len(last) == 2:
        keys.append(clock(parts))
    return keys


def plain(whole: str, decimals: str = "") -> str:
    """A number without zeros that do not change it."""
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def clock(parts: list[str]) -> str:
    """A time; a full hour is the number alone."""
    hour, *others = parts
    return ":".join([plain(hour), *others]) if any(other.strip("0") for other in others) else plain(hour)


def ordinary_words(texts: Iterable[str]) -> set[str]:
    """Words that the texts write in lower case more often than with a capital inside a sentence."""
    counts: Counter[str] = Counter()
    for text in texts:
        for piece in pieces(text):
            if piece.kind in ("name", "word"):
                counts[piece.keys[0]] += 1 if piece.kind == "name" else -1
    return {word for word, count in counts.items() if count < 0}


def check(completion: str, sources: Iterable[str], ordinary: set[str]) -> tuple[int, list[str]]:
    """The number of names and numbers of a completion, and those of them that are in no source."""
    support = {key for source in sources for piece in pieces(source) for key in piece.keys}
    total, missing = 0, []
    for text, keys, kind in pieces(completion):
        if kind == "word" or (kind == "doubtful" and keys[0] in ordinary):
            continue
        total += 1
        supported = not support.isdisjoint(keys) if kind == "number" else support.issuperset(keys)
        if not supported:
            missing.append(text)
    return total, missing
