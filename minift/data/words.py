"""Words and their tokens, for tokenizers like GPT-2's: it cuts a text into words, and gives a word the same tokens in
every text. A table of the words so far takes a third of the time of tokenizing each text anew (SAMSum, one core).
"""

import re
from itertools import chain

from tokenizers import Tokenizer, models, pre_tokenizers

# GPT-2's pattern (Radford et al. 2019, encoder.py), as it reads texts of ASCII alone
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
MOST_CHARACTERS = 2_000_000  # of the words in the table, before it is emptied; they take some 50 MB


def has_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer cuts texts by GPT-2's pattern and then tokenizes each word by itself."""
    cut, model = tokenizer.pre_tokenizer, tokenizer.model
    return (isinstance(cut, pre_tokenizers.ByteLevel) and cut.use_regex and not cut.add_prefix_space
            and isinstance(model, models.BPE) and model.dropout is None and tokenizer.normalizer is None)


class WordTokenizer:
    """Tokenizes by a table of words where the tokenizer `has_words`. Texts that are not ASCII, or name a control token,
    go to the package as they are, as do all texts of another tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.has_words = tokenizer, has_words(tokenizer)
        names = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        self.control_token = re.compile("|".join(names) or r"\Z.")  # \Z. matches nowhere
        self.known: dict[str, list[int]] = {}
        self.characters = 0

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The token ids of texts."""
        if self.characters > MOST_CHARACTERS:
            self.known.clear()
            self.characters = 0
        by_word = [self.has_words and text.isascii() and not self.control_token.search(text) for text in texts]
        words = [WORD.findall(text) if simple else [] for text, simple in zip(texts, by_word, strict=True)]
        new = list(set(chain.from_iterable(words)) - self.known.keys())
        self.known.update(zip(new, self._encode(new), strict=True))
        self.characters += sum(map(len, new))
        others = iter(self._encode([text for text, simple in zip(texts, by_word, strict=True) if not simple]))
        return [list(chain.from_iterable(map(self.known.__getitem__, cut))) if simple else next(others)
                for cut, simple in zip(words, by_word, strict=True)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # the package encodes a list of texts on all cores; _fast does not count the characters of each token
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
