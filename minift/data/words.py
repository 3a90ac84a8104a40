"""Texts -> tokens. A tokenizer like GPT-2's cuts a text into words, and a word has the same tokens in every text. With
a table of the words so far, tokenizing takes a quarter of the time (SAMSum, one core).

Tokens of a text are bytes here, four for each token: they are joined, and sent to another process, at once.
"""

import copy
import re
from array import array

from tokenizers import Tokenizer, models, pre_tokenizers

from minift.errors import tokenizer_faults

# GPT-2's pattern (Radford et al. 2019, encoder.py), as it reads texts of ASCII alone
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# In other texts, a stretch without white space that has a character outside ASCII counts as one word, together with one
# space before it. GPT-2's pattern also cuts there: in its words, white space can only be the first character.
OTHER = r"(?:(?<!\S)| )[^\s\x80-\U0010ffff]*[\x80-\U0010ffff]\S*"
WORD_OR_OTHER = re.compile(f"{OTHER}|{WORD.pattern}", re.ASCII)
# White space outside ASCII: the property White_Space in Unicode's PropList.txt, and one character that once had it
OTHER_SPACE = "[\x85\xa0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# With 20 characters outside ASCII in a row, a text is probably in a script without spaces: its "words" never return
NO_WORDS = re.compile(OTHER_SPACE + r"|[\x80-\U0010ffff]{20}")
MOST_CHARACTERS = 2_000_000  # of the words in the table, before it is emptied; they take some 50 MB


def has_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer cuts texts by GPT-2's pattern and then tokenizes each word by itself."""
    cut, model = tokenizer.pre_tokenizer, tokenizer.model
    return (isinstance(cut, pre_tokenizers.ByteLevel) and cut.use_regex and not cut.add_prefix_space
            and isinstance(model, models.BPE) and model.dropout is None and tokenizer.normalizer is None)


def to_bytes(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def to_ids(tokens: bytes) -> list[int]:
    return array("i", tokens).tolist()


class WordTokens(dict[str, bytes]):
    """Word -> its tokens, found when the word is first looked up."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.characters = 0  # of all words

    def __missing__(self, word: str) -> bytes:
        self.characters += len(word)
        self[word] = tokens = to_bytes(self.tokenizer.encode(word, add_special_tokens=False).ids)
        return tokens


class WordTokenizer:
    """Tokenizes by a table of words where the tokenizer `has_words`. Texts that name a control token, or have NO_WORDS,
    go to the package as they are, as do all texts of another tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.has_words = tokenizer, has_words(tokenizer)
        names = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        self.control_token = re.compile("|".join(names) or r"\Z.")  # \Z. matches nowhere
        self.known = WordTokens(tokenizer)

    def tokenize(self, texts: list[str]) -> list[bytes]:
        """The tokens of texts."""
        found = list(map(self._by_words, texts))
        others = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        # the package encodes a list of texts on all cores; _fast does not count the characters of each token
        encodings = iter(self.tokenizer.encode_batch_fast(others, add_special_tokens=False))
        return [to_bytes(next(encodings).ids) if tokens is None else tokens for tokens in found]

    def _by_words(self, text: str) -> bytes | None:
        """The tokens of a text, or None if the table cannot be used for it."""
        if not self.has_words or self.control_token.search(text):
            return None
        is_ascii = text.isascii()
        if not is_ascii and NO_WORDS.search(text):
            return None
        if self.known.characters > MOST_CHARACTERS:
            self.known = WordTokens(self.tokenizer)
        words = (WORD if is_ascii else WORD_OR_OTHER).findall(text)
        return b"".join(map(self.known.__getitem__, words))


class TextTokenizer:
    """A tokenizer without its settings: nothing is added, cut or padded. It is a copy, made once for many texts.

    The name of a control token in a text (`<|endoftext|>`) is read as that token, as in transformers; with
    `control_tokens` "text" it is text like any other.
    """

    def __init__(self, tokenizer: Tokenizer, control_tokens: str = "tokens"):
        plain = without_limits(tokenizer)
        plain.encode_special_tokens = control_tokens == "text"
        self.first = self.continued = WordTokenizer(plain)
        # texts that follow others in their rows: a tokenizer that puts a space before every text must put none here
        if getattr(plain.pre_tokenizer, "add_prefix_space", False):
            continued = copy.deepcopy(plain)
            continued.pre_tokenizer.add_prefix_space = False
            self.continued = WordTokenizer(continued)

    def tokenize(self, texts: list[str], continued: bool = False) -> list[bytes]:
        """The tokens of texts. `continued`: the texts follow others in their rows. Raises UserError."""
        tokenizer = self.continued if continued else self.first
        with tokenizer_faults("the tokenizer fails on one of the texts"):
            return tokenizer.tokenize(texts)

    def tokenize_rows(self, rows: list[list[str]]) -> list[list[bytes]]:
        """Rows of texts -> the tokens of each text of each row. Raises UserError."""
        firsts = self.tokenize([row[0] for row in rows])
        others = iter(self.tokenize([text for row in rows for text in row[1:]], continued=True))
        tokens = []
        for row, first in zip(rows, firsts, strict=True):
            tokens.append([first, *(next(others) for _ in row[1:])])
        return tokens


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither cuts nor pads; the tokenizer itself is not changed."""
    plain = copy.deepcopy(tokenizer)
    plain.no_truncation()
    plain.no_padding()
    return plain
