"""Facts of one text for the data report: its letters and digits alone, its ending, its script or language."""

import re
import unicodedata
from collections import Counter
from functools import cache

# ---- letters and digits alone

SEPARATORS = frozenset("Pc Pd Ps Pe Pi Pf Po Zs Zl Zp Cc Cf".split())  # categories; symbols such as + are none


def is_separator(char: str) -> bool:
    """Whether a character is punctuation, white space or an invisible control."""
    return unicodedata.category(char) in SEPARATORS


ASCII_SEPARATORS = bytes(code for code in range(128) if is_separator(chr(code)))
DIGITS = bytes(code if code in b"0123456789" else 32 for code in range(256))  # other bytes become spaces


@cache
def other_separators() -> re.Pattern[str]:
    """Separators outside ASCII."""
    return re.compile("[" + "".join(filter(is_separator, map(chr, range(128, 0x10000)))) + "]")


def bare(text: str) -> tuple[bytes, bytes]:
    """The text in UTF-8 without case, white space and punctuation, and its numbers, with a space between them.

    By the numbers, "1 23" differs from "12 3". A text of nothing but punctuation is kept as it is.
    """
    if not text.isascii():
        text = other_separators().sub(" ", unicodedata.normalize("NFC", text))
    folded = text.casefold().encode("utf-8", "surrogatepass")
    letters = folded.translate(None, ASCII_SEPARATORS)
    numbers = b" ".join(folded.translate(DIGITS).split())  # several times faster than a regular expression
    return letters or folded, numbers


# ---- the ending

CLOSED, OPEN, UNKNOWN = range(3)
SENTENCE_BYTES = 40  # of a last line without a full stop at least: a shorter one is a name, a label or a title
LIST_ITEM = re.compile(r"\s*(?:[-*•#|]|\w{1,3}[.):、])")

# Full stops and their like in Latin, Greek, Armenian, Arabic, Devanagari, Ethiopic, Khmer, Burmese, Tibetan, Chinese
# and Japanese: the frequent ones of the property Sentence_Terminal in Unicode's PropList.txt, and the ellipsis
STOPS = frozenset(".!?…;·։՜՞؟۔।॥።፧፨។៕။།༎。！？．｡")
CLOSERS = "\"'`*_)]}>»›”’“‘」』】〉》〕）］｝＂＇"  # may follow a full stop
CONTINUES = frozenset(",:;-–—،؛՝、，；：")  # a sentence does not end in one of these
CONTROL_TOKEN = re.compile(r"\s*<\|?/?\w+\|?>$")  # </s>, <|endoftext|>


def ending(text: str) -> int:
    """CLOSED by a full stop or its like, OPEN where a long line ends in a letter, a digit or a comma.

    UNKNOWN is any other: a short answer, a list, a link, a smiley, code.
    """
    text = text.rstrip()
    if text.endswith(">"):
        text = CONTROL_TOKEN.sub("", text)
    inner = text.rstrip(CLOSERS)
    last = inner[-1:]
    if last in STOPS:
        return CLOSED
    line = text[text.rfind("\n") + 1 :]
    if inner != text or len(line.encode("utf-8", "surrogatepass")) < SENTENCE_BYTES or LIST_ITEM.match(line):
        return UNKNOWN
    is_mark = unicodedata.category(last)[0] == "M"  # such as a vowel of Hindi
    return OPEN if last.isalnum() or last in CONTINUES or is_mark else UNKNOWN


# ---- script and language

# Frequent words of each language that are no English words
FUNCTION_WORDS = {
    "English": "the of and with this that are was were has have will his her they their you it to for be she not by",
    "German": "der das und ist nicht mit ein eine einen auch auf für den sich wird haben wir ich sie es",
    "French": "le les des est dans une qui avec sont pas vous nous il elle ce cette aux du je que",
    "Spanish": "el los las y una por para es su está pero muy del lo como que se más este tiene",
    "Italian": "il di che è gli una sono della nel anche più ha alla dei non questo si lo ma dal",
    "Portuguese": "os um uma não para é em ao são na pelo você ele ela dos que se mais seu foi",
    "Dutch": "het een van niet voor zijn aan ook maar wordt naar heeft bij dat hij ik zij ze er worden",
    "Polish": "się nie jest na że jak są przez dla oraz czy jego po od ma który tym za był może",
    "Swedish": "och att det som är på för inte har av ett jag till med den han hon kan från vi",
    "Turkish": "ve bir bu için ile da çok daha olarak gibi kadar değil sonra olan ama en mi ben",
    "Indonesian": "yang dan untuk dengan tidak ini itu dari pada adalah akan dalam ke saya mereka bisa",
}
LANGUAGES: dict[str, list[str]] = {}  # word -> its languages
for _language, _words in FUNCTION_WORDS.items():
    for _word in _words.split():
        LANGUAGES.setdefault(_word, []).append(_language)
KNOWN_WORDS = frozenset(LANGUAGES)
LEAST_WORDS = 3  # different ones of FUNCTION_WORDS that a text needs for its language to be told
LATIN = "Latin"
EAST_ASIAN = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "Chinese or Japanese")  # Japanese has all three
NO_SCRIPT = frozenset(("MODIFIER", "MICRO", "FEMININE", "MASCULINE", "SUPERSCRIPT", "SUBSCRIPT", "MATHEMATICAL"))


@cache
def script(char: str) -> str:
    """The script of a letter, such as Cyrillic; "" for other characters. It is the first word of its Unicode name."""
    name = unicodedata.name(char, "").split(" ")[0] if char.isalpha() else ""
    return "" if name in NO_SCRIPT else EAST_ASIAN.get(name, name.capitalize())


def language(text: str) -> str:
    """The language of a text in Latin letters if its words tell it, the script of others, "" without letters."""
    if not text.isascii():
        scripts = Counter(map(script, set(text)))
        del scripts[""]
        if not scripts:
            return ""
        found, _ = scripts.most_common(1)[0]
        if found != LATIN:
            return found
    words = KNOWN_WORDS.intersection(text.casefold().split())
    if len(words) < LEAST_WORDS:
        return LATIN
    counts = Counter(name for word in words for name in LANGUAGES[word]).most_common(2)
    name, count = counts[0]
    is_clear = count >= LEAST_WORDS and (len(counts) == 1 or count >= 2 * counts[1][1])
    return name if is_clear else LATIN
