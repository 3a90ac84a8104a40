"""What the tests of the data room share: files of rows, and a tokenizer whose tokens can be counted."""

import json
from pathlib import Path

import tokenizers

from minift.data.pairs import Pair
from minift.data.tokens import Example

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


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.prompt, pair.completion) for pair in pairs]


def example(n_prompt: int, n_completion: int, start: int = 1) -> Example:
    ids = list(range(start, start + n_prompt + n_completion)) + [EOS]
    return Example(ids, ((n_prompt, len(ids)),), Pair("p", "c", f"x:{start}"))
