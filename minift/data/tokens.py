"""Pairs -> rows of token ids, with the spans of them that are learned."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from minift.data.chats import between
from minift.data.layouts import Pair, Ranges
from minift.data.words import TextTokenizer, to_ids, without_limits
from minift.errors import UserError, tokenizer_faults
from minift.model.packing import Row


@dataclass(frozen=True)
class Example(Row):
    """A row of tokens, and its pair of texts."""

    pair: Pair

    @property
    def prompt(self) -> list[int]:
        """The tokens before the completion, which is the last span; it is generated from them."""
        return self.ids[: self.spans[-1][0]]


@dataclass
class Counts:
    """Counts of a split's pairs for the report."""

    texts: int = 0  # pairs that are a text alone
    shortened: int = 0  # rows that lost the beginning of their prompt
    joined: int = 0  # rows with `join` between prompt and completion
    dropped: int = 0  # pairs that do not fit
    first_dropped: str = ""  # the place of the first of them
    control_tokens: Counter[str] = field(default_factory=Counter)  # in the texts, by name


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], control_tokens: str = "tokens") -> list[list[int]]:
    """The token ids of a few texts, see TextTokenizer. Raises UserError."""
    return list(map(to_ids, TextTokenizer(tokenizer, control_tokens).tokenize(texts)))


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before every text, such as BERT's [CLS]; GPT-2's puts none."""
    with tokenizer_faults("the tokenizer fails on a text"):
        encoding = without_limits(tokenizer).encode("a")
    added = encoding.special_tokens_mask  # 0: a token of the text
    return encoding.ids[: added.index(0)] if 0 in added else []


def control_names(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> name of the added tokens, without the runs of white space that some vocabularies add for plain text."""
    added = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.content.strip()}


def prompt_pieces(prompt: str, learned: Ranges) -> list[tuple[str, bool]]:
    """A prompt cut into texts that are tokenized separately, and whether each is learned. At least one text.

    `learned` are ranges of characters. A token must not cross their ends: it would be half learned.
    """
    pieces = []
    end = 0
    for begin, stop in learned:
        pieces += [(prompt[end:begin], False), (prompt[begin:stop], True)]
        end = stop
    return [*pieces, (prompt[end:], False)]


def _pieces(pair: Pair, join: str) -> list[tuple[str, bool]]:
    """A row cut into texts that are tokenized separately, and whether each is learned.

    The completion is a text of its own, so that its prompt has the same tokens when the model must complete it.
    """
    if not pair.prompt:
        return [(pair.completion, True)]
    # the space belongs to the completion, since GPT-2's tokens begin with their space
    completion = between(pair.prompt, pair.completion, join) + pair.completion
    return [*prompt_pieces(pair.prompt, pair.learned), (completion, True)]


class Encoder:
    """Pairs -> rows of tokens that end in `eos_id`, at most `max_length` long.

    A prompt that is too long loses its beginning. A pair is left out if not even one token of its prompt fits, or if
    either text has no tokens. A text alone becomes windows. Raises UserError for a `max_length` below 3.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int, max_length: int, join: str = " ",
                 control_tokens: str = "tokens"):
        if max_length < 3:
            raise UserError(f"--max-length {max_length}: must be 3 or more: prompt, completion and end-of-text")
        self.tokenizer, self.eos_id, self.max_length, self.join = tokenizer, eos_id, max_length, join
        self.control_tokens = control_tokens
        self.start, self.names = start_tokens(tokenizer), control_names(tokenizer)

    def pieces(self, pair: Pair) -> list[str]:
        """The texts of a pair that are tokenized separately."""
        return [text for text, _ in _pieces(pair, self.join)]

    def count_control_tokens(self, tokens: list[list[bytes]], counts: Counts) -> None:
        """Add the control tokens in the pieces of pairs to `counts`."""
        ids = np.frombuffer(b"".join(chain.from_iterable(tokens)), np.int32)
        found = ids[np.isin(ids, list(self.names))]
        counts.control_tokens.update(self.names[i] for i in found.tolist())

    def rows(self, pair: Pair, tokens: list[bytes], counts: Counts) -> list[Example]:
        """The rows of a pair with the tokens of its pieces: one, several windows of a text alone, or none. Adds to
        `counts`."""
        ids = list(map(to_ids, tokens))
        if pair.prompt:
            rows = self._prompted_row(pair, ids, counts)
        else:
            rows = _windows(pair, ids[0], self.start or [self.eos_id], self.eos_id, self.max_length, self.tokenizer)
        counts.texts += not pair.prompt
        counts.dropped += not rows
        if not rows:
            counts.first_dropped = counts.first_dropped or pair.where
        return rows

    def _prompted_row(self, pair: Pair, tokens: list[list[int]], counts: Counts) -> list[Example]:
        """The row of a pair with a prompt, or none if it does not fit."""
        learned = [is_learned for _, is_learned in _pieces(pair, self.join)]
        example = _make_row(pair, tokens, learned, self.start, self.eos_id, self.max_length)
        if example is None:
            return []
        unshortened = len(self.start) + sum(map(len, tokens)) + (tokens[-1][-1] != self.eos_id)
        counts.shortened += len(example.ids) < unshortened
        counts.joined += bool(between(pair.prompt, pair.completion, self.join))
        return [_without_end(example, tokens[-1], self.tokenizer, self.eos_id)]


def _make_row(pair: Pair, tokens: list[list[int]], learned: list[bool], start: list[int], eos_id: int,
              max_length: int) -> Example | None:
    """Start tokens, prompt, completion and end-of-text as a row, or None if they do not fit.

    `tokens` are those of the pieces, the last of which is the completion; `learned` says for each if it is learned.
    """
    *before, completion = tokens
    end = [] if completion[-1:] == [eos_id] else [eos_id]
    prompt = list(chain.from_iterable(before))
    most = max_length - len(start) - len(completion) - len(end)  # tokens of the prompt
    if most < 1 or not prompt or not completion:
        return None
    dropped = max(0, len(prompt) - most)
    ids = start + prompt[dropped:] + completion + end

    spans = []
    piece_begin = len(start) - dropped  # index in the row; a dropped piece has a smaller one than the prompt
    for piece, is_learned in zip(before, learned[:-1], strict=True):
        piece_end = piece_begin + len(piece)
        begin = max(piece_begin, len(start), 1)  # 1: the row's first token has none before it to be predicted from
        if is_learned and begin < piece_end:
            spans.append((begin, piece_end))
        piece_begin = piece_end
    spans.append((piece_begin, len(ids)))  # the completion and the end-of-text
    return Example(ids, tuple(spans), pair)


def _without_end(example: Example, completion: list[int], tokenizer: Tokenizer, eos_id: int) -> Example:
    """The same row; if the file wrote an end-of-text into the completion, the pair lacks it.

    The pair's completion is the reference of a score, and a generated text ends before its end-of-text.
    """
    name = tokenizer.id_to_token(eos_id)
    if completion[-1] != eos_id or not name or not example.pair.completion.endswith(name):
        return example
    return replace(example, pair=replace(example.pair, completion=example.pair.completion.removesuffix(name)))


def _windows(pair: Pair, text: list[int], start: list[int], eos_id: int, max_length: int,
             tokenizer: Tokenizer) -> list[Example]:
    """A text alone as rows of at most `max_length` tokens, in which every token of the text is learned once.

    The first row begins with `start`, usually an end-of-text, since GPT-2 was trained on texts with one between them.
    Each other row begins with the last token of the row before, from which its first target is predicted.
    """
    if not text:
        return []
    ids = text if text[: len(start)] == start else start + text
    ids = ids if text[-1] == eos_id else [*ids, eos_id]
    step = max_length - 1
    rows = []
    for number, begin in enumerate(range(0, len(ids) - 1, step), 1):
        window = ids[begin : begin + max_length]
        part = pair
        if len(ids) > max_length:
            where = pair.where if number == 1 else f"{pair.where} window {number}"
            targets = window[1:-1] if window[-1] == eos_id else window[1:]
            part = replace(pair, completion=tokenizer.decode(targets, skip_special_tokens=False), where=where)
        rows.append(Example(window, ((1, len(window)),), part))
    return rows
