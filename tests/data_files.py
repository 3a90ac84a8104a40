"""What the tests of the data room share: files of rows, and a tokenizer whose tokens can be counted."""

import json
from pathlib import Path

import tokenizers

from minift.data import dataset, pairs
from minift.data.dataset import DataOptions
from minift.data.layouts import Pair, PairOptions
from minift.data.pair_file import NewPairFile, StoredPairs
from minift.data.readers import FileFormat
from minift.data.row_store import Examples
from minift.data.tokens import Counts, Encoder, Example
from minift.data.words import TextTokenizer

EOS = 256


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, and end-of-text: lengths can be counted by hand."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert tokenizer.token_to_id("<|endoftext|>") == EOS
    return tokenizer


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + count)]


def read_file(path: Path, prompt_field: str | None = None, completion_field: str | None = None,
              skip_bad: bool = False, format: FileFormat = pairs.PLAIN_FORMAT,
              **flags) -> tuple[StoredPairs, list[str]]:
    options = PairOptions(prompt_field, completion_field, **flags)
    return pairs.read_file(path, options, format, skip_bad, NewPairFile(0, None))


def encode(pairs: list[Pair], tokenizer: tokenizers.Tokenizer, eos_id: int, max_length: int,
           *options: str, **more: str) -> tuple[list[Example], Counts]:
    encoder, counts, rows = Encoder(tokenizer, eos_id, max_length, *options, **more), Counts(), []
    text_tokenizer = TextTokenizer(tokenizer, encoder.control_tokens)
    tokenized = text_tokenizer.tokenize_rows(list(map(encoder.pieces, pairs)))
    encoder.count_control_tokens(tokenized, counts)
    for pair, tokens in zip(pairs, tokenized, strict=True):
        rows += encoder.rows(pair, tokens, counts)
    return rows, counts


def load(path: Path, room: int, seed: int = 0, **options) -> tuple[dict[str, Examples], list[str]]:
    """All rows of a file, with the tokenizer of bytes."""
    limits = {"train": None, "val": None, "test": None}
    found = dataset.load_examples(DataOptions(data=str(path), **options), seed, byte_tokenizer(), EOS, room, limits)
    return found[:2]  # without the facts on quality


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.prompt, pair.completion) for pair in pairs]


def example(n_prompt: int, n_completion: int, start: int = 1) -> Example:
    ids = list(range(start, start + n_prompt + n_completion)) + [EOS]
    return Example(ids, ((n_prompt, len(ids)),), Pair("p", "c", f"x:{start}"))
