"""The end-of-text token that a base was trained with. Several files name one, and they may disagree."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minift.errors import UserError
from minift.files.tokenizer import Settings, read_optional

CONTROL = re.compile(r"<.+>|\[.+\]")  # the usual names of control tokens: <|endoftext|>, </s>, [SEP]


def end_of_text(folder: Path, config: dict[str, Any], tokenizer: Tokenizer | None, settings: Settings,
                vocab_size: int) -> tuple[int | None, list[str]]:
    """The id of the end-of-text, or None if no file names a token of the vocabulary; and a note if files disagree.

    `config` is the parsed config.json. Raises UserError.
    """
    # The order of trust:
    # 0 an eos_token in the tokenizer's files, 1 a generation_config.json, 2 a config.json that names a control token,
    # 3 the default of the tokenizer's class, 4 any other config.json: it often keeps the id of another tokenizer.
    found: list[tuple[int, str, int]] = []  # (order, file, id)
    path = folder / "generation_config.json"
    generation = read_optional(path)
    for number in token_ids(generation, path):
        order = 1
        if generation.get("_from_model_config") is True:  # a copy of config.json, made by transformers
            order = 2 if is_control_token(tokenizer, number) else 4
        found.append((order, path.name, number))
    for number in token_ids(config, folder / "config.json"):
        order = 2 if is_control_token(tokenizer, number) else 4
        found.append((order, "config.json", number))
    number = None if tokenizer is None else tokenizer.token_to_id(settings.text("eos_token") or "")
    if number is not None:
        is_default = settings.named.get("eos_token") is None
        found.append((3 if is_default else 0, "the tokenizer", number))
    if tokenizer is None and not found and "eos_token_id" not in config:
        found.append((5, "GPT-2's default", 50256))

    possible = [candidate for candidate in found if 0 <= candidate[2] < vocab_size]
    if not possible:
        return None, []
    _, source, chosen = min(possible, key=lambda candidate: candidate[0])
    agreeing = {file for _, file, number in found if number == chosen}  # a file may list several ids
    others = ""
    for _, file, number in found:
        if file not in agreeing:
            others += f"; {file} has {show_token(tokenizer, number)}"
    note = f"{folder}: the end-of-text is {show_token(tokenizer, chosen)}, as {source} says{others}"
    return chosen, [note] if others else []


def show_token(tokenizer: Tokenizer | None, number: int) -> str:
    """A token's id, with its text if there is one: 50256 ('<|endoftext|>')."""
    text = None if tokenizer is None or number < 0 else tokenizer.id_to_token(number)
    return str(number) if text is None else f"{number} ({text!r:.40})"


def token_ids(raw: dict[str, Any], path: Path) -> list[int]:
    """eos_token_id of a parsed file as a list: it may be a number, a list or null. Raises UserError."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    # the tokenizers package takes 32 bits; a negative id is a placeholder in some files
    if not all(type(number) is int and abs(number) < 2**31 for number in ids):
        raise UserError(f"{path}: eos_token_id is {value!r:.80}, and must be a token id")
    return ids


def is_control_token(tokenizer: Tokenizer | None, number: int) -> bool:
    """Whether a token looks like a control token, and not like a part of plain text."""
    text = None if tokenizer is None or number < 0 else tokenizer.id_to_token(number)
    if text is None:
        return False
    return number in tokenizer.get_added_tokens_decoder() or CONTROL.fullmatch(text) is not None
